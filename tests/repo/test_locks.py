import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lock(extra: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{extra}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version.split(";")[0].strip() for name, version in pins}


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_a_lock_holds_what_the_project_declares(extra: str) -> None:
    pins, extras = lock(extra), PROJECT["optional-dependencies"]
    for declared in [*PROJECT["dependencies"], *extras[extra], *extras["demo"], *extras["dev"]]:
        requirement = Requirement(declared)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), declared


def test_the_cpu_lock_is_free_of_cuda_and_of_the_torchvision_trap() -> None:
    pins = lock("cpu")
    assert pins["torch"] == "2.13.0"  # no local version: pip takes the CPU build where it finds one
    assert not {name for name in pins if re.match("torchvision|torchaudio|torchcodec|nvidia-|cuda-", name)}


def test_the_gpu_lock_has_the_cuda_libraries() -> None:
    assert any(name.startswith("nvidia-cublas") for name in lock("gpu"))


def test_extras() -> None:
    assert {"cpu", "gpu", "demo", "dev"} <= set(PROJECT["optional-dependencies"])
    assert PROJECT["name"] == "ppo-ray"


def test_the_lock_of_trl_is_what_the_comparison_says() -> None:
    pins = lock("trl")
    wanted = {"trl": "0.11.3", "transformers": "4.45.2", "torch": lock("cpu")["torch"]}  # the same arithmetic for both
    assert {name: pins[name] for name in wanted} == wanted
    assert not {name for name in pins if re.match("nvidia-|cuda-|triton", name)}
    for line in (ROOT / "requirements/trl.in").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line
