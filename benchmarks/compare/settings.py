"""What a benchmark was asked for; results that lie in a folder go on only under the same."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from ppo_ray import atomic
from ppo_ray.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
_CODE = ("ppo_ray/**/*.py", "configs/imdb.yaml", "requirements/*.txt", "benchmarks/compare/trl_loop.py")


@dataclass(frozen=True)
class Settings:
    """Of all arms and rounds."""

    shape: str
    """A name of `ours.SHAPES`."""
    batch_size: int
    steps: int
    rounds: int
    """May become more: those that are done stay."""
    first_seed: int
    """Of round 0; each later round has the next."""
    threads: int
    arms: list[str]
    overrides: list[str]
    """For ppo_ray alone."""
    code: str
    """XXH3-64 of what is measured."""

    def claim(self, folder: Path) -> None:
        """Say in the folder what its results are of.

        Raises:
            InputError: it has results of other settings, or of other code.
        """
        path, fields = folder / "settings.json", asdict(self)
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                f"{name}: {found.get(name)} -> {value}"
                for name, value in fields.items()
                if name != "rounds" and found.get(name) != value
            ]
            if changed:
                raise InputError(
                    f"{folder} has results of other settings ({'; '.join(changed)}); give another --output, or --fresh "
                    "to begin again there"
                )
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(fields, indent=1))


def code_digest() -> str:
    """Return the XXH3-64 of the code that is measured, hexadecimal."""
    state = xxhash.xxh3_64()
    for path in sorted(path for pattern in _CODE for path in ROOT.glob(pattern)):
        state.update(path.read_bytes())
    return state.hexdigest()
