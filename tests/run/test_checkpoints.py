import errno
import json
from pathlib import Path

import pytest
import xxhash

from ppo_ray import checkpoint
from ppo_ray.checkpoint import Pending, RunState
from ppo_ray.config import CheckpointConfig
from ppo_ray.errors import CheckpointError, UnreadableError
from ppo_ray.events import Event
from ppo_ray.run.checkpoints import Checkpoints


def save_learner(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "learner").mkdir()
    (folder / "learner" / "optimizer.safetensors").write_bytes(b"moments")


def begin(path: Path, state: RunState, config: str) -> Pending:
    return Pending(lambda: checkpoint.write(path, state, config, save_learner))


class Folder:
    def __init__(self, path: Path, **options: object) -> None:
        self.path, self.events = path, list[Event]()
        self.checkpoints = Checkpoints(path, CheckpointConfig(**options), "steps: 9\n", self.events.append)

    def save(self, *steps: int) -> None:
        for step in steps:
            self.checkpoints.save(RunState(step, 8 * step, "f00"), begin)
            self.checkpoints.finish()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir() if not path.is_symlink() and path.is_dir())

    def link(self, name: str) -> str:
        return (self.path / name).readlink().as_posix()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "checkpoints")


def test_what_is_written_is_read(folder: Folder) -> None:
    folder.save(10)
    path, state = folder.checkpoints.newest() or (None, None)
    assert path == folder.path / "step-00010"
    assert state == RunState(10, 80, "f00")
    assert (path / "config.yaml").read_text() == "steps: 9\n"
    assert folder.link("latest") == "step-00010"


def test_there_is_none(folder: Folder) -> None:
    assert folder.checkpoints.newest() is None


@pytest.mark.parametrize("every", [0, 1, 4])
def test_when_one_is_due(tmp_path: Path, every: int) -> None:
    checkpoints = Folder(tmp_path, every_steps=every).checkpoints
    due = [step for step in range(1, 11) if checkpoints.is_due(step, 10)]
    assert due == {0: [10], 1: list(range(1, 11)), 4: [4, 8, 10]}[every]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [cut, change, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "learner/optimizer.safetensors", "run.json", "checksums.json"])
def test_the_one_before_a_torn_one_is_taken(folder: Folder, damage, name: str) -> None:
    folder.save(4, 8)
    damage(folder.path / "step-00008" / name)
    path, state = folder.checkpoints.newest() or (None, None)
    assert (path, state) == (folder.path / "step-00004", RunState(4, 32, "f00"))
    assert [event.kind for event in folder.events] == ["torn_checkpoint"]
    assert "step-00008" in folder.events[0].message
    assert folder.names() == ["step-00004", "torn-step-00008"]
    folder.save(8)  # the run gets there again
    assert (folder.checkpoints.newest() or (None,))[0] == folder.path / "step-00008"


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path, keep_last=2)
    for step, score in ((2, 0.1), (4, 0.9), (6, 0.3), (8, 0.2)):
        folder.save(step)
        folder.checkpoints.note_score(step, score)  # of the batch that this very policy sampled
    assert folder.names() == ["step-00004", "step-00006", "step-00008"]
    assert (folder.link("best"), folder.link("latest")) == ("step-00004", "step-00008")
    folder.checkpoints.note_score(7, 5.0)  # a policy that was not saved
    folder.checkpoints.note_score(6, None)  # no text of it could be scored
    assert folder.link("best") == "step-00004"


def test_the_best_need_not_be_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path, keep_last=1, keep_best=False)
    for step in (2, 4, 6):
        folder.save(step)
        folder.checkpoints.note_score(step, -step)
    assert folder.names() == ["step-00006"]


def test_final_is_never_removed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, keep_last=1, keep_best=False)
    folder.save(2)
    folder.checkpoints.finish_run(2)
    folder.save(4, 6)
    assert folder.names() == ["step-00002", "step-00006"]
    folder.checkpoints.finish_run(6)
    assert folder.link("final") == "step-00006"


def test_a_full_disk_leaves_the_earlier_ones(folder: Folder) -> None:
    folder.save(2)

    def full(path: Path) -> None:
        save_learner(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(CheckpointError, match=r"step-00004 could not be written: .*No space left.*--resume"):
        checkpoint.write(folder.path / "step-00004", RunState(4), "", full)
    assert folder.names() == ["step-00002"]
    assert not list(folder.path.glob(".*"))
    checkpoint.verify(folder.path / "step-00002")


def test_what_was_begun_is_waited_for_once(folder: Folder) -> None:
    calls = []
    folder.checkpoints.save(
        RunState(2), lambda *arguments: Pending(lambda: calls.append(arguments) or begin(*arguments).wait())
    )
    assert not calls
    folder.checkpoints.finish()
    folder.checkpoints.finish()
    assert len(calls) == 1
    folder.checkpoints.save(RunState(2), lambda *_: pytest.fail("it is there"))
    folder.checkpoints.save(RunState(3), lambda *_: Pending(lambda: pytest.fail("its writer is gone")))
    folder.checkpoints.abandon()
    folder.checkpoints.finish()


def test_nobody_waits_for_what_is_not_written_yet_and_its_score_is_not_lost(tmp_path: Path) -> None:
    """The batch that tells how good a policy is may be scored before that policy is written."""
    folder = Folder(tmp_path, keep_last=1)
    folder.save(1)
    folder.checkpoints.note_score(1, 0.5)
    written: list[bool] = []
    done = [False, True]
    folder.checkpoints.save(
        RunState(2), lambda *arguments: Pending(lambda: begin(*arguments).wait() or written.append(True), done.pop)
    )
    done.reverse()
    folder.checkpoints.finish(wait=False)
    folder.checkpoints.note_score(2, 0.9)
    assert written == [] and folder.link("best") == folder.link("latest") == "step-00001"
    folder.checkpoints.finish(wait=False)
    assert written == [True] and folder.link("best") == folder.link("latest") == "step-00002"
    folder.checkpoints.save(RunState(3), lambda *_: Pending(lambda: None))
    folder.checkpoints.note_score(3, 7.0)
    folder.checkpoints.abandon()  # the learner is lost, and with it what it was writing
    folder.save(3)
    assert folder.link("best") == "step-00002" and folder.names() == ["step-00002", "step-00003"]


def test_sums_that_were_made_while_writing_are_taken_and_hold(tmp_path: Path) -> None:
    def save(folder: Path) -> checkpoint.FileSums:
        (folder / "other").write_bytes(b"read again")
        return {"part": (4, "0123456789abcdef")}  # of another rank's file, which this node need not see yet

    checkpoint.write(tmp_path / "c", RunState(1), "", save)
    sums = json.loads((tmp_path / "c" / "checksums.json").read_text())
    assert list(sums) == ["config.yaml", "other", "part", "run.json"]
    assert sums["part"] == [4, "0123456789abcdef"] and sums["other"] == [10, xxhash.xxh3_64_hexdigest(b"read again")]
    with pytest.raises(CheckpointError, match="is not whole"):
        checkpoint.verify(tmp_path / "c")


def test_one_that_cannot_be_read_is_not_taken_for_torn(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(2, 4)

    def stale(file: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(file))

    with monkeypatch.context() as patch, pytest.raises(UnreadableError, match=r"step-00004 cannot be read: .*Stale"):
        patch.setattr(checkpoint, "_checksum", stale)
        folder.checkpoints.newest()
    assert folder.names() == ["step-00002", "step-00004"] and folder.events == []
    assert (folder.checkpoints.newest() or (None,))[0] == folder.path / "step-00004"


@pytest.mark.parametrize("how", ["save", "newest"])
def test_the_latest_is_linked_though_its_writer_died_before(folder: Folder, how: str) -> None:
    folder.save(2)
    checkpoint.write(folder.path / "step-00004", RunState(4, 32, "f00"), "", save_learner)
    assert folder.link("latest") == "step-00002"
    folder.save(4) if how == "save" else folder.checkpoints.newest()
    assert folder.link("latest") == "step-00004"


def test_what_cannot_be_removed_yet_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path, keep_last=1, keep_best=False)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.atomic, "discard", busy)
        folder.save(2, 4)
    assert folder.names() == ["step-00002", "step-00004"]
    folder.save(6)
    assert folder.names() == ["step-00006"]


def test_a_link_that_cannot_be_made_costs_no_checkpoint(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(2)

    def full(path: Path, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="latest could not be made to point at"):
        patch.setattr(checkpoint.atomic, "link", full)
        folder.checkpoints.newest()
    assert folder.names() == ["step-00002"] and folder.events == []


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "inside"])
def test_only_files_of_the_folder_itself_are_checked(folder: Folder, name: str, tmp_path: Path) -> None:
    """Checksums of a stranger's checkpoint can name any file; one without end would be read for ever."""
    folder.save(2)
    path = folder.path / "step-00002"
    (folder.path / "outside").write_text("")
    (path / "inside").symlink_to("/dev/zero")
    sums = json.loads((path / "checksums.json").read_text())
    (path / "checksums.json").write_text(json.dumps({name: [0, "0"], **sums}))
    with pytest.raises(CheckpointError, match=f"'{name}' is no file of its folder"):
        checkpoint.verify(path)
