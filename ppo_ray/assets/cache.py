"""Where the offline assets lie, and how one is built whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from ppo_ray.errors import AssetError

AssetName = Literal["policy", "classifier", "prompts"]
_PATHS: dict[AssetName, str] = {"policy": "policy", "classifier": "classifier", "prompts": "prompts.parquet"}
_VERSION = "imdb-v1"  # another recipe is another folder, so that a run never meets half of each


def cache_folder() -> Path:
    """Return the folder of all assets: `$PPO_RAY_CACHE`, or the user's cache folder."""
    root = os.environ.get("PPO_RAY_CACHE")
    return (Path(root) if root else user_cache_path("ppo-ray")) / _VERSION


def asset_path(name: AssetName) -> Path:
    """Return where an asset lies once it is built."""
    return cache_folder() / _PATHS[name]


def build_once(target: Path, build: Callable[[Path], None], force: bool = False) -> bool:
    """Build a file or folder unless it is there; whatever happens, it is never there half-made.

    `build` writes to a path beside the target, which is synced and renamed at the end. What a failed build left is
    removed at once, what a killed one left by the next; of two builds at once the second waits for the first and
    finds its work done.

    Args:
        target: the file or folder wanted.
        build: makes it at the path it is given.
        force: build it again if it is there.

    Returns:
        Whether it was built.

    Raises:
        AssetError: the disk is full or may not be written to.
    """
    aside = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            _remove(aside)
            _remove(replaced)
            if target.exists() and not force:
                return False
            try:
                build(aside)
                _sync(aside)
            except BaseException:
                _remove(aside)
                raise
            if target.is_dir():  # a folder cannot be renamed over; removed in its place it could be left half there
                target.rename(replaced)
            aside.replace(target)
            _sync_one(target.parent)
            _remove(replaced)
            return True
    except OSError as error:
        raise AssetError(
            f"{target}: cannot be built: {error}; free the disk, or set PPO_RAY_CACHE to another folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or a folder with all its files, onto the disk."""
    for part in [*path.rglob("*"), path]:
        _sync_one(part)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
