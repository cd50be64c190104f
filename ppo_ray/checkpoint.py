"""Checkpoints: the whole state of a run between two steps, in a folder that is there whole or not at all.

`checkpoints/step-00010` is the state after ten steps: the policy for `from_pretrained` as it lies, its value head or
critic, `learner/` (optimizer, KL controller, running moments), `run.json`, `config.yaml`, and `checksums.json` over all
of it. There is no state of random generators: every seed is derived from where it is used.
"""

import json
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import xxhash

from ppo_ray import atomic
from ppo_ray.errors import CheckpointError, UnreadableError

if TYPE_CHECKING:
    import pyarrow as pa

LATEST, BEST, FINAL = "latest", "best", "final"
"""Links to a checkpoint: the newest, the one whose policy scored highest, the one after the last step."""
AHEAD = "ahead.parquet"
"""In a checkpoint: the next step's trajectories, scored, where generation overlaps with learning."""
LEARNER_FOLDER = "learner"
"""In a checkpoint: the learner's own files; vLLM would take safetensors files beside the model for a part of it."""
_CHECKSUMS, _STATE, _CONFIG = "checksums.json", "run.json", "config.yaml"
_CHUNK = 16 << 20  # bytes
_QUOTED = 300  # characters of an error
_LEAST_LIMIT, _TIMES = 256 << 20, 100  # bytes that trajectories may unpack to, or how many times the file's size

Record = TypeVar("Record")

Pending = Callable[[], None]
"""Waits until something is done; raises what went wrong."""


@dataclass(frozen=True)
class RunState:
    """Where a run is between two steps; the learner's own state lies beside it."""

    step: int = 0
    """Steps done, and the number of the next one."""
    prompt_position: int = 0
    """Of the prompt stream."""
    prompts_fingerprint: str = ""
    """Of the texts and the tokenizer: they must be the same when the run goes on."""

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the state out of a checkpoint that is whole.

        Raises:
            CheckpointError: it is not there, or not one of ours.
        """
        return read_record(cls, checkpoint / _STATE)


BeginSave = Callable[[Path, RunState, str], Pending]
"""Begins `write` with a path, a state and a config where the learner is, and returns what waits for it."""


def read_record(kind: type[Record], path: Path) -> Record:
    """Read a dataclass that was written as JSON.

    Raises:
        CheckpointError: the file is not there, or holds something else; names the first mistake.
    """
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:_QUOTED]}") from error


def read_ahead(checkpoint: Path) -> "pa.Table":
    """Read the next step's trajectories out of a checkpoint.

    Raises:
        CheckpointError: they are not there, or damaged, or something else, or unpack to far more than their size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ppo_ray import trajectory

    path = checkpoint / AHEAD
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            unpacked, size = sum(group.total_byte_size for group in groups), path.stat().st_size
            if unpacked > max(_LEAST_LIMIT, _TIMES * size):
                raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
            table = file.read()
        table.validate(full=True)
        trajectory.validate(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:_QUOTED]}") from error
    return table


def write(path: Path, state: RunState, config: str, save_learner: Callable[[Path], None]) -> None:
    """Write a checkpoint whole or not at all; what is at `path` already is replaced at the end.

    Args:
        path: the folder.
        state: of the run.
        config: YAML of it.
        save_learner: writes the learner's state into the folder it is given.

    Raises:
        CheckpointError: the disk is full, or may not be written to; earlier checkpoints are as they were.
    """

    def make(folder: Path) -> None:
        folder.mkdir()
        save_learner(folder)
        (folder / _STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        (folder / _CONFIG).write_text(config, encoding="utf-8")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sums = {file.relative_to(folder).as_posix(): [file.stat().st_size, _checksum(file)] for file in files}
        (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")

    try:
        atomic.build(path, make)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written: {error}. Earlier ones are as they were; free the disk and go on "
            "with --resume, or keep fewer (checkpoint.keep_last, checkpoint.every_steps)"
        ) from error


def verify(path: Path) -> None:
    """Check that every file of a checkpoint is there as it was written.

    The checksums show damage. They do not show who wrote the files.

    Raises:
        CheckpointError: one is missing, cut or changed; names it.
        UnreadableError: one may not or cannot be read, which says nothing of what is in it.
    """
    try:
        sums: dict[str, tuple[int, str]] = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, (size, checksum) in sums.items():
            file = path / name
            if not stat.S_ISREG(file.lstat().st_mode) or not file.resolve().is_relative_to(path.resolve()):
                raise CheckpointError(f"{path}: {name!r} is no file of its folder")
            if file.stat().st_size != size or _checksum(file) != checksum:
                raise CheckpointError(f"{path}: {name} is not as it was written ({file.stat().st_size} bytes)")
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not whole: {error}") from error
    except OSError as error:
        raise UnreadableError(
            f"checkpoint {path} cannot be read: {error}. It may be whole all the same, so no earlier one is taken: "
            "make it readable, or move it away, and go on with --resume"
        ) from error


def _checksum(file: Path) -> str:
    """Return XXH3-64 of a file's bytes, hexadecimal."""
    state = xxhash.xxh3_64()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
