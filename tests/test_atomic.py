import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ppo_ray import atomic


def test_a_failed_write_leaves_the_old_text_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_link_points_elsewhere_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        atomic.link(tmp_path / "latest", name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
    (tmp_path / "folder").mkdir()  # what a file system without links, or an earlier version, left there
    atomic.link(tmp_path / "folder", "one")
    assert (tmp_path / "folder").readlink() == Path("one")
    assert sorted(os.listdir(tmp_path)) == ["folder", "latest", "one", "two"]


def make(path: Path, text: str) -> None:
    path.mkdir()
    (path / "a").write_text(text)


def test_a_folder_is_built_over_another(tmp_path: Path) -> None:
    for text in ("old", "new"):
        atomic.build(tmp_path / "x", lambda path, text=text: make(path, text))
    assert (tmp_path / "x" / "a").read_text() == "new" and os.listdir(tmp_path) == ["x"]
    atomic.discard(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def hold(path: Path, held: multiprocessing.Event) -> None:
    with atomic.lock(path):
        held.set()
        time.sleep(60)


def test_two_that_build_the_same_mix_nothing(tmp_path: Path) -> None:
    """One was given up, and goes on writing all the same: on a node that was cut off, say."""

    def first(path: Path) -> None:
        make(path, "first")
        atomic.build(tmp_path / "folder", lambda path: make(path, "second"))
        (path / "b.txt").write_text("first")

    with pytest.raises(FileNotFoundError):
        atomic.build(tmp_path / "folder", first)
    assert os.listdir(tmp_path) == ["folder"]
    assert {file.read_text() for file in (tmp_path / "folder").rglob("*") if file.is_file()} == {"second"}


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(30)
    with pytest.raises(BlockingIOError), atomic.lock(tmp_path / "lock", wait=False):
        pytest.fail("two at once")
    process.kill()
    process.join()
    with atomic.lock(tmp_path / "lock", wait=False):
        pass


def test_no_link_is_followed_when_writing(tmp_path: Path) -> None:
    """A folder that somebody else prepared must not lead to the writer's other files."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), atomic.lock(tmp_path / ".lock"):
        raise AssertionError
    for name in (".a.txt.partial", "a.txt"):
        (tmp_path / name).symlink_to(victim)
    atomic.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and not (tmp_path / "a.txt").is_symlink()
    assert victim.read_text() == "precious"


def test_a_lock_is_its_owners_alone_and_cuts_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("kept")
    (tmp_path / ".lock").chmod(0o644)
    with atomic.lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / ".lock").read_text() == "kept"
