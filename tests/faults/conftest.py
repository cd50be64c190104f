"""Runs that nothing happens to, and what disturbed ones are held against."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, lines, made_once, tiny_command_line

Same = Callable[..., None]

OPTIONS = (
    # everything that a learner must remember: running moments, an adaptive coefficient, a learning rate that moves
    *("ppo.score_scaling=mean_std", "ppo.kl_horizon=50", "ppo.warmup_steps=3", "checkpoint.every_steps=2"),
    *("ray.ping_timeout_s=15", "reward.workers=2"),
)


@pytest.fixture
def ppo_ray(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path: Path) -> Iterator[CommandLine]:
    with tiny_command_line(tiny_policy, tiny_classifier, tiny_prompts, tmp_path) as command_line:
        yield command_line


@pytest.fixture(scope="session")
def same_as_undisturbed(
    tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Same:
    """Return a check that a run is, bit for bit, what a run of that engine and length is that nothing happens to."""

    def undisturbed(engine: str, steps: int, options: tuple[str, ...]) -> Path:
        def make(folder: Path) -> None:
            with tiny_command_line(tiny_policy, tiny_classifier, tiny_prompts, folder) as command_line:
                result = command_line.train(f"rollout.engine={engine}", f"steps={steps}", *OPTIONS, *options)
                assert result.returncode == 0, result.stderr

        return made_once(tmp_path_factory, "-".join(["undisturbed", engine, str(steps), *options]), make) / "run"

    def check(run: Path, engine: str, steps: int, *options: str) -> None:
        other = undisturbed(engine, steps, options)
        assert lines(run) == lines(other)
        assert [line["step"] for line in lines(run)] == list(range(steps))
        for folder, pattern in (("trajectories", "*"), ("checkpoints/final", "**/*.safetensors")):
            files = {path.relative_to(run / folder): path for path in (run / folder).glob(pattern)}
            others = {path.relative_to(other / folder): path for path in (other / folder).glob(pattern)}
            assert files.keys() == others.keys()
            assert len(files) >= 3
            for name, path in files.items():
                assert path.read_bytes() == others[name].read_bytes(), f"{name} differs"
        assert (run / "samples.md").read_text() == (other / "samples.md").read_text()

    return check
