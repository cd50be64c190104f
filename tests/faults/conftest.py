"""Chance that can be repeated, and the comparison with a run that nothing happens to."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Undisturbed, lines, seconds_of_steps

Same = Callable[..., None]


class Dice(random.Random):
    """Chance; its seed is shown with a test that fails, and the variable FAULTS_SEED repeats it."""

    def nap(self, run: Path) -> None:
        """Wait for up to one and a half steps, as long as the run's shortest one."""
        time.sleep(self.uniform(0, 1.5) * min(seconds_of_steps(run)))


@pytest.fixture
def dice() -> Dice:
    seed = os.environ.get("FAULTS_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"the same moments again: FAULTS_SEED={seed}")
    return Dice(seed)


@pytest.fixture(scope="session")
def same_as_undisturbed(undisturbed: Undisturbed) -> Same:
    """Return a check that a run is, bit for bit, what a run of that engine is that nothing happens to."""

    def check(run: Path, engine: str, steps: int | None = None, *options: str) -> None:
        other = undisturbed(engine, steps, *options)
        assert lines(run) == lines(other)
        assert [line["step"] for line in lines(run)] == list(range(len(lines(other))))
        for folder, pattern in (("trajectories", "*"), ("checkpoints/final", "**/*.safetensors")):
            files = {path.relative_to(run / folder): path for path in (run / folder).glob(pattern)}
            others = {path.relative_to(other / folder): path for path in (other / folder).glob(pattern)}
            assert files.keys() == others.keys()
            assert len(files) >= 2
            for name, path in files.items():
                assert path.read_bytes() == others[name].read_bytes(), f"{name} differs"
        assert (run / "samples.md").read_text() == (other / "samples.md").read_text()

    return check
