"""The learner's state: all that a checkpoint holds of it.

Scalars are written as JSON and tensors as safetensors, with no pickle.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ppo_ray import trajectory
from ppo_ray.algo.rewards import RunningMoments
from ppo_ray.checkpoint import AHEAD, LEARNER_FOLDER, read_record
from ppo_ray.errors import CheckpointError, first_line
from ppo_ray.machine import max_memory_of_file
from ppo_ray.models.actor_critic import ActorCritic

_FILE = "state.json"


@dataclass(frozen=True)
class LearnerState:
    """The scalars of a learner's state; models and optimizer lie in files of their own."""

    policy_version: int
    kl_coef: float
    """Weight of the KL penalty in the next update."""
    moments: RunningMoments
    """Running moments of all scores so far."""
    weights_checksum: str
    """Checksum of the policy's weights; see `StateChecksums`."""
    reference_checksum: str
    """Checksum of the reference's weights: another reference would be another run."""
    by_tensor: bool = False
    """Whether the checksums are made of those of each tensor; older checkpoints have one over all bytes in a row."""

    def write(self, folder: Path) -> None:
        """Write into a checkpoint's folder; floats are written so that the very same are read."""
        path = folder / LEARNER_FOLDER / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read out of a checkpoint's folder.

        Raises:
            CheckpointError: it is not there, or not one of ours.
        """
        return read_record(cls, folder / LEARNER_FOLDER / _FILE)


def make_plain_files(policy: ActorCritic, tokenizer: Any, dtype: torch.dtype) -> dict[str, bytes]:
    """Return what a checkpoint holds of models and tokenizer beside the tensors, which are of a type; by path."""
    with tempfile.TemporaryDirectory(prefix="ppo_ray-") as folder:
        policy.save_configs(Path(folder), dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_ahead(checkpoint: Path) -> pa.Table:
    """Read the next step's trajectories out of a checkpoint.

    Raises:
        CheckpointError: they are not there, or damaged, or something else, or unpack to far more than their size.
    """
    path = checkpoint / AHEAD
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            unpacked, size = sum(group.total_byte_size for group in groups), path.stat().st_size
            if unpacked > max_memory_of_file(size):
                raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
            table = file.read()
        table.validate(full=True)
        trajectory.validate(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return table
