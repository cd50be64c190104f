"""The package that is sent with a job: the files of a folder that Ray would send, and the config, as a zip archive."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from zipfile import ZIP_DEFLATED, ZipFile

from ray._private import ray_constants
from ray._private.runtime_env import packaging

from ppo_ray.errors import InputError

LIMIT = ray_constants.DASHBOARD_CLIENT_MAX_SIZE
"""Bytes of a package; Ray's job server refuses a larger one (HTTP 413), whatever Ray's documents say of 512 MiB."""

_SHOWN = 3  # folders, and files, that a message names
_QUIET = logging.getLogger(f"{__name__}.quiet")
_QUIET.setLevel(logging.ERROR)


@dataclass(frozen=True)
class Package:
    """The files of a folder that go to the cluster: not those that .gitignore, .rayignore or Ray itself leave out.

    Ray leaves out .git, .venv, venv and __pycache__, or what RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES says instead.
    """

    folder: Path | None = None
    """None: no folder is sent."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Paths below the folder, with their bytes."""

    @classmethod
    def scan(cls, folder: Path) -> Self:
        """List the files that Ray would send of a folder, by Ray's own code.

        Raises:
            InputError: there is no such folder, something in it cannot be read, or a link in it leads out of it.
        """
        folder = folder.absolute()
        if not folder.is_dir():
            raise InputError(f"--working-dir={folder}: no such folder")
        files: dict[str, int] = {}
        outside: list[str] = []

        def take(path: Path) -> None:
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.stat().st_size
                if not path.resolve().is_relative_to(folder.resolve()):
                    outside.append(path.relative_to(folder).as_posix())

        excluded = packaging._get_excludes(folder, ray_constants.get_runtime_env_default_excludes())
        try:
            packaging._dir_travel(folder, [excluded], take, include_gitignore=_gitignore_counts(), logger=_QUIET)
        except OSError as error:
            raise InputError(f"--working-dir={folder}: {error.filename} cannot be read: {error.strerror}") from error
        if outside:
            raise InputError(
                f"--working-dir={folder}: {len(outside):,} files lie elsewhere, behind links, e.g. {outside[0]}: they "
                "would be sent too. Copy what the job needs, or leave the links out with a .rayignore"
            )
        return cls(folder, files)

    @property
    def size(self) -> int:
        """Bytes as Ray counts them: before compression."""
        return sum(self.files.values())

    def holds(self, path: str) -> bool:
        """Say whether a file, or anything of a folder, is sent; `path` is relative to the package's folder."""
        wanted = Path(path).as_posix()
        return wanted in self.files or any(name.startswith(f"{wanted}/") for name in self.files)

    def problem(self) -> str | None:
        """Return that the package is too large, and what makes it so; None if it is not."""
        if self.size <= LIMIT:
            return None
        folders = Counter[str]()
        for name, size in self.files.items():
            folders[f"{name.partition('/')[0]}/" if "/" in name else name] += size
        largest = dict(folders.most_common(_SHOWN)) | dict(Counter(self.files).most_common(_SHOWN))
        shown = ", ".join(f"{name} {_mib(size)}" for name, size in largest.items())
        return (
            f"--working-dir={self.folder}: {_mib(self.size)} in {len(self.files):,} files, more than the {_mib(LIMIT)} "
            f"that Ray's job server takes; largest: {shown}. Leave out what the job does not need with a .rayignore in "
            "it (written like a .gitignore), and put models and data where all nodes find them, with absolute paths in "
            "the config"
        )

    def write(self, target: Path, texts: Mapping[str, str]) -> None:
        """Write the archive: the files, and texts by their names.

        Raises:
            InputError: a file cannot be read.
        """
        with ZipFile(target, "w", ZIP_DEFLATED, strict_timestamps=False) as archive:
            for name in self.files:
                try:
                    archive.write(Path(self.folder or ".", name), name)
                except OSError as error:
                    raise InputError(f"--working-dir={self.folder}: {name} cannot be read: {error.strerror}") from error
            for name, text in texts.items():
                archive.writestr(name, text)


def _gitignore_counts() -> bool:
    """Say whether Ray follows .gitignore: it does, unless it is told not to."""
    return os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
