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
