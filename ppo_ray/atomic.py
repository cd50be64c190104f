"""Atomic writes: a file or folder is there whole or not at all, whenever the process or the machine dies."""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it; make its folder if there is none.

    Each writer has a file aside of its own, so that two writers never mix their bytes. What a killed one left,
    `remove_partial_files` removes: a writer does not list the folder, which may be large.

    Args:
        path: of the file.
        make: writes it at the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = name_aside(path)
    try:
        make(aside)
        _sync_one(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file; see `write`."""
    write(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def build(target: Path, make: Callable[[Path], None], aside: Path | None = None) -> None:
    """Make a file or folder under another name, sync it to the disk and rename it, over what is there.

    What a failed `make` left is removed at once; what a killed one left is removed by the next. A writer that was cut
    off and given up, but goes on elsewhere, has a name of its own: it can fail, and never mixes its files with the
    next writer's.

    Args:
        target: the file or folder wanted; its parent is made if there is none.
        make: makes it at the path it is given.
        aside: that path, of `name_aside`, where several processes write into the folder before one of them calls this;
            None: a new one.

    Raises:
        OSError: the disk is full, or may not be written to; what was at `target` is still there.
    """
    aside = aside or name_aside(target)
    old = _old_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_remnants(target, but=aside)
    try:
        make(aside)
        _sync(aside)
    except BaseException:
        with contextlib.suppress(OSError):  # another process may write there still
            remove(aside)
        raise
    if target.is_dir():  # a folder cannot be renamed over; removed in its place it could be left half there
        target.rename(old)
    aside.replace(target)
    _sync_one(target.parent)
    remove(old)


def remove_remnants(target: Path, but: Path | None = None) -> None:
    """Remove what a killed `build` of a file or folder left beside it, except one path."""
    for remnant in [*target.parent.glob(f".{glob.escape(target.name)}.*partial"), _old_path(target)]:
        if remnant != but:
            remove(remnant)


def link(path: Path, target: str) -> None:
    """Make a symbolic link, or point the one that is there to another target."""
    aside = name_aside(path)
    aside.symlink_to(target)
    if path.is_dir() and not path.is_symlink():
        remove(path)
    aside.replace(path)
    _sync_one(path.parent)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends.

    Only the account that made the file can hold it. Nothing is written: the file may have been put there by another.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        OSError: the path is a link, or may not be opened.
    """
    with open(path, "a", opener=lambda name, flags: open_no_link(name, flags, 0o600)) as file:
        if os.fstat(file.fileno()).st_uid == os.geteuid():
            os.fchmod(file.fileno(), 0o600)  # an older version left it open to readers, who can hold a lock too
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def open_no_link(name: str | Path, flags: int, mode: int = 0o644) -> int:
    """Open a file as `os.open`, for `open(opener=...)`; a link is not followed: it may lead to somebody's file.

    Raises:
        OSError: the path is a link.
    """
    return os.open(name, flags | os.O_NOFOLLOW, mode)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a folder so that nobody ever sees it without some of its files."""
    gone = _old_path(path)
    remove(gone)
    path.rename(gone)
    remove(gone)


def remove_partial_files(folder: Path) -> None:
    """Remove the files that killed writers left in a folder."""
    for remnant in folder.glob(".*.partial"):
        remove(remnant)


def name_aside(path: Path) -> Path:
    """Return a name beside a path that no other writer has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _old_path(target: Path) -> Path:
    """Return the name that a file or folder has while it is being replaced or removed."""
    return target.with_name(f".{target.name}.replaced")


def _sync(path: Path) -> None:
    """Sync a file, or a folder with all its files, to the disk."""
    for part in [*path.rglob("*"), path]:
        _sync_one(part)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
