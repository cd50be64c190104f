"""The folder of one run: what lies where, who may write to it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ppo_ray import __version__
from ppo_ray.config import Config, to_yaml
from ppo_ray.errors import InputError
from ppo_ray.metrics import METRICS_FILE, TENSORBOARD_FOLDER


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder."""

    path: Path
    """Of the folder itself, absolute."""

    @property
    def config(self) -> Path:
        """Every option of the run, defaults included."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / METRICS_FILE

    @property
    def tensorboard(self) -> Path:
        """Folder of the same metrics for TensorBoard."""
        return self.path / TENSORBOARD_FOLDER

    @property
    def trajectories(self) -> Path:
        """Folder of one Parquet file a step."""
        return self.path / "trajectories"

    @property
    def final_checkpoint(self) -> Path:
        """Folder of the trained policy, for `AutoModelForCausalLM.from_pretrained`."""
        return self.path / "checkpoints" / "final"

    @property
    def samples(self) -> Path:
        """Held-out prompts with their responses before and after, a Markdown table."""
        return self.path / "samples.md"

    @property
    def curves(self) -> Path:
        """Score and KL over the steps, a picture."""
        return self.path / "curves.png"

    def trajectory_file(self, step: int) -> Path:
        """Where a step's trajectories go."""
        return self.trajectories / f"step-{step:05d}.parquet"

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
                f"give another folder (output_dir=...), or move or delete this one"
            )
        try:
            folder.trajectories.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}"
            raise InputError(f"output_dir={output_dir}: cannot be created: {reason}") from error
        if not os.access(folder.path, os.W_OK | os.X_OK):
            raise InputError(f"output_dir={output_dir}: may not be written to; give another folder")
        return folder

    def write_config(self, config: Config, folder: Path | None = None) -> None:
        """Write the resolved config into the run's folder, or into another, e.g. a checkpoint's."""
        header = f"# The resolved config of a run of ppo_ray {__version__}: every option, defaults included.\n"
        write_atomically((folder or self.path) / self.config.name, header + to_yaml(config))

    def _remnant(self) -> Path | None:
        """Return a file that only a run with at least one step leaves behind."""
        if self.metrics.is_file() and self.metrics.stat().st_size:
            return self.metrics
        left = [self.samples, self.curves, *self.trajectories.glob("*"), *self.path.glob("checkpoints/*")]
        return next((path for path in left if path.exists()), None)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that nobody ever sees half of it, whatever happens meanwhile; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
