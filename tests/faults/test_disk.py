"""A disk that is full: the checkpoint that does not fit is an error, those that are there stay whole."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import OPTIONS, STEPS, CommandLine
from tests.faults.conftest import Same

pytestmark = pytest.mark.slow


@pytest.fixture
def resize(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Mount a small disk where the run is written, and return what changes its size."""
    folder = tmp_path / "run"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)

    try:
        mount("size=12m")
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("only root may mount")
    yield lambda size: mount(f"remount,size={size}")
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.timeout(600)
def test_a_full_disk(
    ppo_ray: CommandLine, tmp_path: Path, resize: Callable[[str], None], same_as_undisturbed: Same
) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", f"steps={STEPS['hf']}", *OPTIONS)
    full = ppo_ray.train(*options)
    assert full.returncode == 1, full.stdout
    assert "step-00006" in full.stderr and "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    assert (run / "checkpoints" / "latest").readlink().name == "step-00004"
    assert ppo_ray.wait_until_gone() == []

    resize("64m")
    again = ppo_ray.train(*options, "--resume")
    assert again.returncode == 0, again.stderr
    assert "going on after 4 steps" in again.stdout
    same_as_undisturbed(run, "hf")
