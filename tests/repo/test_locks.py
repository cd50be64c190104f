"""The locks: one for all Python versions, with checksums, and torch's builds in locks of their own."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements.set_up import PYTHONS

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCKS = ["pip", "cpu", "gpu", "dev", "trl", "torch-cpu", "torch-cuda"]


def lines(lock: str) -> list[str]:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def requirements(lock: str) -> list[Requirement]:
    return [Requirement(line.partition(" --hash")[0]) for line in lines(lock)]


def pins(lock: str, python: str = "3.11") -> dict[str, str]:
    """Return a lock's names and versions on Linux, x86-64 and one version of Python."""
    machine = {"python_full_version": f"{python}.1", "sys_platform": "linux", "platform_machine": "x86_64"}
    found = [item for item in requirements(lock) if item.marker is None or item.marker.evaluate(machine)]
    assert len({item.name for item in found}) == len(found)
    return {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in found}


@pytest.mark.parametrize("lock", LOCKS)
def test_each_package_has_one_version_and_checksums(lock: str) -> None:
    pattern = r"[a-z0-9-]+==[^\s;*,]+( ; [^#]+?)?( +--hash=sha256:[0-9a-f]{64})+ *"
    assert [line for line in lines(lock) if not re.fullmatch(pattern, line)] == []
    assert lines(lock)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_a_lock_holds_what_the_project_declares(extra: str, python: str) -> None:
    locked, extras = pins(extra, python) | pins("dev", python), PROJECT["optional-dependencies"]
    if extra == "cpu":
        locked |= pins("torch-cpu", python)
    for declared in [*PROJECT["dependencies"], *extras[extra], *extras["demo"], *extras["dev"], *extras["docs"]]:
        requirement = Requirement(declared)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), declared


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_the_tools_of_developers_are_in_a_lock_that_images_do_not_install(image: str) -> None:
    tools, runs = pins("dev"), pins(image)
    assert {"pytest", "ruff", "mypy", "hypothesis", "uv"} <= tools.keys()
    assert not tools.keys() & runs.keys()
    for tool in tools:  # what they need is in one of the two
        needs = [Requirement(line) for line in metadata.requires(tool) or []]
        wanted = [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
        assert {canonicalize_name(name) for name in wanted} <= tools.keys() | runs.keys(), tool


@pytest.mark.parametrize("lock", ["cpu", "trl", "torch-cpu"])
def test_no_cpu_lock_has_cuda_or_falls_into_the_torchvision_trap(lock: str) -> None:
    assert not {name for name in pins(lock) if re.match("torchvision|torchaudio|torchcodec|nvidia-|cuda-", name)}
    assert lock == "torch-cpu" or "torch" not in pins(lock)


def test_both_builds_of_torch_are_of_one_version_and_cudas_is_what_its_libraries_are_for() -> None:
    version = pins("torch-cuda")["torch"]
    assert pins("torch-cpu") == {"torch": f"{version}+cpu"}
    assert pins("gpu")["torch"] == version == "2.13.0"
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "cuda-bindings"} <= pins("torch-cuda").keys() & pins("gpu").keys()
    assert pins("cpu")["triton"] == pins("trl")["triton"] == pins("gpu")["triton"]  # what PyPI's torch wants


def test_the_locks_serve_the_python_versions_that_the_project_names() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]},<3.14"
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named == set(PYTHONS)
    (served,) = PYPROJECT["tool"]["uv"]["environments"]
    machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
    versions = [f"3.{minor}" for minor in range(11, 16)]
    assert [v for v in versions if Marker(served).evaluate({"python_full_version": f"{v}.0", **machine})] == [*PYTHONS]


def test_extras() -> None:
    assert {"cpu", "gpu", "demo", "dev"} <= set(PROJECT["optional-dependencies"])
    assert PROJECT["name"] == "ppo-ray"


def test_the_lock_of_trl_is_what_the_comparison_says() -> None:
    locked = {**pins("trl"), **pins("torch-cpu")}  # the same arithmetic for both
    assert (locked["trl"], locked["transformers"]) == ("0.11.3", "4.45.2")
    for line in (ROOT / "requirements/trl.in").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line
