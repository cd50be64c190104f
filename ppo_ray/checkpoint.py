"""Checkpoints: the whole state of a run between two steps, in a folder that is there whole or not at all.

`checkpoints/step-00010` is the state after ten steps: the policy for `from_pretrained` as it lies, its value head or
critic, `learner/` (optimizer, KL controller, running moments), `run.json`, `config.yaml`, and `checksums.json` over all
of it. There is no state of random generators: every seed is derived from where it is used.
"""

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

import xxhash

from ppo_ray import atomic
from ppo_ray.errors import CheckpointError, UnreadableError

LATEST, BEST, FINAL = "latest", "best", "final"
"""Links to a checkpoint: the newest, the one whose policy scored highest, the one after the last step."""
AHEAD = "ahead.parquet"
"""In a checkpoint: the next step's trajectories, scored, where generation overlaps with learning."""
LEARNER_FOLDER = "learner"
"""In a checkpoint: the learner's own files; vLLM would take safetensors files beside the model for a part of it."""
_CHECKSUMS, _STATE, _CONFIG = "checksums.json", "run.json", "config.yaml"
_CHUNK = 16 << 20  # bytes
_QUOTED = 300  # characters of an error

Record = TypeVar("Record")

FileSums = Mapping[str, tuple[int, str]]
"""Size in bytes and XXH3-64 of files, by their paths in a checkpoint."""


@dataclass(frozen=True)
class Pending:
    """Something that is being done elsewhere."""

    wait: Callable[[], object]
    """Waits until it is done; raises what went wrong."""
    is_done: Callable[[], bool] = lambda: False
    """Says whether `wait` would return, or raise, at once; false if that is not known."""


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


def write(
    path: Path,
    state: RunState,
    config: str,
    save_learner: Callable[[Path], FileSums | None],
    aside: Path | None = None,
    leads: bool = True,
) -> None:
    """Write a checkpoint whole or not at all; what is at `path` already is replaced at the end.

    Where a learner has several ranks all of them call this, each in its own process. The first one renames the folder
    when the files of all are in it.

    Args:
        path: the folder.
        state: of the run.
        config: YAML of it.
        save_learner: writes the learner's state into the folder it is given, and syncs what it hashes; returns the sums
            of the files that it has hashed meanwhile, those of the other ranks too. Other files are read and hashed.
        aside: where the ranks write until then, see `atomic.name_aside`; None: a place of this process alone.
        leads: whether this is the first rank; the others write what is theirs.

    Raises:
        CheckpointError: the disk is full, or may not be written to; earlier checkpoints are as they were.
    """

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        sums = dict(save_learner(folder) or {})
        (folder / _STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        (folder / _CONFIG).write_text(config, encoding="utf-8")
        for file in (file for file in folder.rglob("*") if file.is_file()):
            name = file.relative_to(folder).as_posix()
            sums[name] = sums.get(name) or (file.stat().st_size, _checksum(file))
        (folder / _CHECKSUMS).write_text(json.dumps(dict(sorted(sums.items())), indent=1), encoding="utf-8")

    try:
        if leads:
            atomic.build(path, make, aside)
        else:
            assert aside is not None
            save_learner(aside)
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
