"""The folder of one run: what lies where, who may write to it."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ppo_ray import __version__, atomic
from ppo_ray.checkpoint import FINAL
from ppo_ray.config import Config, to_yaml
from ppo_ray.errors import InputError
from ppo_ray.machine import max_memory_of_file
from ppo_ray.run.log import ACTORS_FILE, METRICS_FILE, TENSORBOARD_FOLDER, has_steps

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder."""

    path: Path
    """Absolute path of the folder itself."""

    @property
    def config(self) -> Path:
        """Every option of the run, defaults included."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / METRICS_FILE

    @property
    def actors(self) -> Path:
        """What each actor did in each step, one JSON object per step: its machine, seconds, memory."""
        return self.path / ACTORS_FILE

    @property
    def tensorboard(self) -> Path:
        """Folder of the same metrics for TensorBoard."""
        return self.path / TENSORBOARD_FOLDER

    @property
    def trajectories(self) -> Path:
        """Folder of one Parquet file a step."""
        return self.path / "trajectories"

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def before(self) -> Path:
        """What held-out prompts said of the policy before the first step; kept for a run that goes on."""
        return self.path / "evaluation_before.json"

    @property
    def after(self) -> Path:
        """What held-out prompts said of the policy after the last step."""
        return self.path / "evaluation_after.json"

    @property
    def final_checkpoint(self) -> Path:
        """Folder of the trained policy, for `AutoModelForCausalLM.from_pretrained`."""
        return self.checkpoints / FINAL

    @property
    def samples(self) -> Path:
        """Held-out prompts with their responses before and after, a Markdown table."""
        return self.path / "samples.md"

    @property
    def curves(self) -> Path:
        """Score and KL over the steps, a picture."""
        return self.path / "curves.png"

    @property
    def report(self) -> Path:
        """All of this as one HTML page, where one was made."""
        return self.path / "report.html"

    @property
    def tracking(self) -> Path:
        """Folder of what has been sent to each tracker, and of the files that trackers keep themselves."""
        return self.path / "tracking"

    def trajectory_file(self, step: int) -> Path:
        """Where a step's trajectories go."""
        return self.trajectories / f"step-{step:05d}.parquet"

    def list_steps(self) -> list[int]:
        """Return the steps that have a file of trajectories, in order, whether or not it can be read."""
        found = (re.fullmatch(r"step-(\d+)\.parquet", path.name) for path in self.trajectories.glob("step-*"))
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if self.trajectory_file(step).exists()]  # under another spelling it is none

    def holds(self, path: Path) -> bool:
        """Say whether a path is within the folder, its links followed: a stranger's folder may link to anywhere."""
        return path.resolve().is_relative_to(self.path.resolve())

    def read_step(self, step: int, columns: Sequence[str] | None = None) -> "pa.Table":
        """Read a step's trajectories; whatever shows them reads them here. See `trajectory.read`.

        Raises:
            OSError, pa.ArrowException: there is no such file; it is torn, or another's; or it is a link that leads out
                of the run's folder, which is not followed; or it unpacks to far more than its size.
        """
        from ppo_ray import trajectory  # loads pyarrow

        path = self.trajectory_file(step)
        if not self.holds(path):
            raise PermissionError(f"{path.name} is a link that leads out of the run's folder, which is not followed")
        if not path.is_file():  # a pipe would wait for ever
            raise FileNotFoundError(f"{path.name} is no file")
        return trajectory.read(path, columns, max_memory_of_file(path.stat().st_size))

    @classmethod
    def create(cls, output_dir: str | Path) -> Self:
        """Make the folder, or take one that holds no run.

        What a run leaves that ended before its first step (its config, empty folders) is no run: it may be started
        again at once.

        Raises:
            InputError: it holds another run, is a file, or cannot be written to.
        """
        folder = cls(Path(output_dir).absolute())
        remnant = folder._remnant()
        if remnant:
            raise InputError(
                f"output_dir={output_dir}: the folder holds another run ({remnant.relative_to(folder.path)}); "
                "go on with it (--resume), give another folder (output_dir=...), or move or delete this one"
            )
        return cls.open(output_dir)

    @classmethod
    def open(cls, output_dir: str | Path) -> Self:
        """Make the folder, or take it with the run that it holds.

        Raises:
            InputError: it is a file, or cannot be written to.
        """
        folder = cls(Path(output_dir).absolute())
        try:
            folder.trajectories.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}"
            raise InputError(f"output_dir={output_dir}: cannot be created: {reason}") from error
        if not os.access(folder.path, os.W_OK | os.X_OK):
            raise InputError(f"output_dir={output_dir}: may not be written to; give another folder")
        return folder

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock ends with this process, however it ends.

        Raises:
            InputError: another process is training in it.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(atomic.lock(self.path / ".lock", wait=False))
            except BlockingIOError as error:
                raise InputError(
                    f"output_dir={self.path}: another process is training in this folder; wait for it, or stop it"
                ) from error
            except OSError as error:
                raise InputError(f"output_dir={self.path}: its .lock cannot be used: {error.strerror}") from error
            for folder in (self.path, self.trajectories, self.checkpoints):
                atomic.remove_partial_files(folder)
            yield

    def holds_run(self) -> bool:
        """Say whether a run began here, if only with its config."""
        return self.config.is_file() or self._remnant() is not None

    def write_config(self, config: Config) -> None:
        """Write the resolved config."""
        atomic.write_text(self.config, config_text(config))

    def clear(self) -> None:
        """Remove what a run left that ended before its first step: it may have been another's."""
        self.before.unlink(missing_ok=True)
        self.metrics.unlink(missing_ok=True)
        self.actors.unlink(missing_ok=True)
        atomic.remove(self.tracking)

    def _remnant(self) -> Path | None:
        """Return a file that only a run with at least one step leaves behind."""
        if has_steps(self.path):
            return self.metrics
        left = [self.samples, self.curves, *self.trajectories.glob("*"), *self.path.glob("checkpoints/*")]
        return next((path for path in left if path.exists()), None)


def config_text(config: Config) -> str:
    """Write a resolved config as YAML that `load_config` reads back."""
    header = f"# The resolved config of a run of ppo_ray {__version__}: every option, defaults included.\n"
    return header + to_yaml(config)
