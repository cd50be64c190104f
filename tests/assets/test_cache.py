import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ppo_ray.assets.cache import asset_path, build_once
from ppo_ray.errors import AssetError


def make(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text("whole")


def hang_half_way(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text("ha")
    time.sleep(60)


def test_built_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "policy"
    assert build_once(target, make)
    assert (target / "a.txt").read_text() == "whole"
    assert not build_once(target, lambda path: pytest.fail("built twice"))
    assert build_once(target, make, force=True)
    assert sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock")) == ["policy"]


def test_a_file_is_an_asset_too(tmp_path: Path) -> None:
    assert build_once(tmp_path / "x.parquet", lambda path: path.write_text("x") and None)
    assert (tmp_path / "x.parquet").read_text() == "x"


def test_a_failing_build_leaves_the_earlier_asset(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    build_once(target, make)
    with pytest.raises(ZeroDivisionError):
        build_once(target, lambda path: make(path) or 1 / 0, force=True)
    assert (target / "a.txt").read_text() == "whole"
    assert not list(tmp_path.glob("*partial"))  # it may be what filled the disk


def test_a_killed_build_leaves_nothing_half_made(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    process = multiprocessing.get_context("fork").Process(target=build_once, args=(target, hang_half_way))
    process.start()
    while not list(tmp_path.glob(".policy.*partial/a.txt")):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not target.exists()
    assert build_once(target, make)  # the lock died with its holder
    assert (target / "a.txt").read_text() == "whole"
    assert not list(tmp_path.glob("*partial"))


def write_three(word: str, folder: Path) -> None:
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(word)


def rebuild_and_die(target: Path, change: int) -> None:
    """Build again, and be killed just before the given change of the file system (1: the first)."""
    left = itertools.count(change - 1, -1)

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def die_or_call(*args: object, **options: object) -> None:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*args, **options)

        return die_or_call

    for name in ("unlink", "rmdir", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    build_once(target, functools.partial(write_three, "new"), force=True)


def test_a_rebuild_killed_anywhere_leaves_the_asset_whole_or_away(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for change in range(1, 30):
        build_once(target, functools.partial(write_three, "old"), force=True)
        process = multiprocessing.get_context("fork").Process(target=rebuild_and_die, args=(target, change))
        process.start()
        process.join()
        words = [path.read_text() for path in sorted(target.iterdir())] if target.exists() else []
        assert words in ([], ["old"] * 3, ["new"] * 3), change
        build_once(target, functools.partial(write_three, "new"))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".policy.lock", "policy"]
        assert len(list(target.iterdir())) == 3
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert change > 4  # it was killed at some changes at all


def test_of_two_builds_at_once_one_works(tmp_path: Path) -> None:
    builds: list[Path] = []

    def slowly(path: Path) -> None:
        builds.append(path)
        time.sleep(0.2)
        make(path)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "policy", slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PPO_RAY_CACHE", str(tmp_path))
    assert asset_path("prompts") == tmp_path / "imdb-v1" / "prompts.parquet"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="PPO_RAY_CACHE"):
        build_once(tmp_path / "file" / "policy", make)
