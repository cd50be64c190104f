"""The cache of the demos' assets: their names and paths, and building one whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from ppo_ray import atomic
from ppo_ray.errors import AssetError

ASSETS = {
    "policy": "policy",
    "classifier": "classifier",
    "reward_model": "reward_model",
    "prompts": "prompts.parquet",
    "sums": "sums.parquet",
    "two_digit_sums": "two_digit_sums.parquet",
    "chats": "chats.parquet",
    "toy": "toy",
    "words": "words.parquet",
}
"""Every asset's name, as in `asset:NAME`, and its file or folder in the cache."""
SETS = {
    "imdb": ("prompts", "policy", "classifier"),
    "arithmetic": ("sums", "two_digit_sums", "policy"),
    "assistant": ("chats", "policy", "classifier", "reward_model"),
    "toy": ("words", "toy"),
}
"""The assets of each demo in the order of their builds: the quickest first, what is made of another after that."""
_VERSION = "imdb-v1"  # another recipe is another folder, so that a run never meets half of each


def cache_folder() -> Path:
    """Return the folder of all assets: `$PPO_RAY_CACHE`, or the user's cache folder."""
    root = os.environ.get("PPO_RAY_CACHE")
    return (Path(root) if root else user_cache_path("ppo-ray")) / _VERSION


def asset_path(name: str) -> Path:
    """Return where an asset lies once it is built.

    Raises:
        KeyError: the name is not one of `ASSETS`.
    """
    return cache_folder() / ASSETS[name]


def build_once(target: Path, build: Callable[[Path], None], force: bool = False) -> bool:
    """Build a file or folder unless it is there; it is never there half-made.

    `build` writes to a path beside the target, which is synced and renamed at the end. What a failed build leaves is
    removed at once; what a killed build leaves is removed by the next one. Of two builds at the same time, the second
    waits for the first and finds its work done.

    Args:
        target: the file or folder wanted.
        build: makes it at the path it is given.
        force: build it again if it is there.

    Returns:
        Whether it was built.

    Raises:
        AssetError: the disk is full or may not be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.lock(target.with_name(f".{target.name}.lock")):
            atomic.remove_remnants(target)
            if target.exists() and not force:
                return False
            atomic.build(target, build)
            return True
    except OSError as error:
        if isinstance(error, PermissionError) and target.exists() and not force:
            return False  # another account built it, in a folder that is shared
        raise AssetError(
            f"{target}: cannot be built: {error}; free the disk, or set PPO_RAY_CACHE to another folder"
        ) from error
