"""Whatever shows a run reads the same files of it, and leaves out the same."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray import trajectory
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.follow import Follower
from ppo_ray.run.record import RunRecord
from ppo_ray.run.report import make_report
from ppo_ray.run.show import Selection, select
from ppo_ray.run.trackers import TrackedRun
from ppo_ray.view.index import Query, TrajectoryIndex
from tests.view.runs import ROWS, make_run, make_step, write_step

LEFT_OUT = {
    2: "torn",
    3: "it is Parquet, and not of a run",
    4: "schema version 9; this ppo_ray reads the versions 1 and 2",
    5: "column score is string",
    6: "it has no column kl",
    7: "a link that leads out of the run's folder, which is not followed",
    8: "step-00008.parquet is no file",
    9: "step-00009.parquet is no file",
    10: "column response has nulls",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with steps 0 and 1 of the schema's versions 1 and 2, behind them what cannot be read, and a link."""
    outside = tmp_path_factory.mktemp("outside")
    run = make_run(outside / "run", 2)
    file = RunFolder(run).trajectory_file
    first = make_step(0).drop_columns(["truncated", "kl"]).replace_schema_metadata({"ppo_ray.schema": "1"})
    pq.write_table(first, file(0))
    file(2).write_bytes(file(1).read_bytes()[:-50])
    pq.write_table(pa.table({"score": [1.0]}), file(3))
    pq.write_table(make_step(4).replace_schema_metadata({"ppo_ray.schema": "9"}), file(4))
    table = make_step(5)
    pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", pa.array(["0"] * ROWS)), file(5))
    pq.write_table(make_step(6).drop_columns(["kl"]), file(6))
    write_step(run, 7).replace(outside / "secret.parquet")
    file(7).symlink_to(outside / "secret.parquet")
    file(8).mkdir()
    os.mkfifo(file(9))
    nulls = pa.array([None, *["text"] * (ROWS - 1)])
    pq.write_table(table.set_column(table.schema.get_field_index("response"), "response", nulls), file(10))
    write_step(run, 11).replace(run / "moved.parquet")
    file(11).symlink_to(run / "moved.parquet")  # within the folder
    (run / "trajectories" / "step-12.parquet").write_bytes(file(1).read_bytes())  # none of ours
    return run


def test_the_table_of_the_viewer(run: Path) -> None:
    index = TrajectoryIndex(RunFolder(run))
    assert index.refresh(60)
    rows = index.search(Query(limit=100)).rows
    assert {row["step"] for row in rows} == {0, 1, 11}
    assert {row["kl"] for row in rows if row["step"] == 0} == {None}
    for step, why in list(LEFT_OUT.items())[2:]:
        assert why in index.skipped[f"step-{step:05d}.parquet"]
    assert index.skipped.keys() == {f"step-{step:05d}.parquet" for step in LEFT_OUT}


def test_show(run: Path) -> None:
    said: list[str] = []
    assert {row["step"] for row in select(run, Selection(by="kl"), said.append)} == {0, 1, 11}
    assert {line.partition(" is left out: ")[0] for line in said} == {f"step-{step:05d}.parquet" for step in LEFT_OUT}
    worst = select(run, Selection(worst=99, by="kl"), said.append)
    assert {row["step"] for row in worst} == {1, 11}  # the first version had no KL


def test_the_report_and_the_table_of_a_tracker(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    RunFolder(run).trajectory_file(11).rename(run / "aside")
    try:
        notes = make_report(RunRecord.read(run))
    finally:
        (run / "aside").rename(RunFolder(run).trajectory_file(11))
    for step in LEFT_OUT:
        assert f"step-{step:05d}.parquet cannot be read and is left out" in notes
    assert "response 1 6" in notes and "response 7" not in notes
    options = {"tracking": {"num_samples": 2, "samples_every_steps": 1}}
    follower = Follower(RunFolder(run), "none", lambda: None, TrackedRun("id", "run", "films", options, tmp_path))
    assert [len(follower._read_samples(step)) for step in (0, 1, 11)] == [2, 2, 2]
    assert [follower._read_samples(step) for step in LEFT_OUT] == [None] * len(LEFT_OUT)
    assert capsys.readouterr().out.count("has no table of responses") == len(LEFT_OUT)


def test_a_folder_of_trajectories_that_lies_elsewhere_is_not_followed(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", 1)
    for path in (other / "trajectories").iterdir():
        path.unlink()
    (other / "trajectories").rmdir()
    (other / "trajectories").symlink_to(run / "trajectories")
    with pytest.raises(PermissionError, match="leads out of the run's folder"):
        RunFolder(other).read_step(1)
    (tmp_path / "link").symlink_to(run)
    assert RunFolder(tmp_path / "link").read_step(1).num_rows == ROWS  # the run itself may be named by a link


def test_what_an_older_version_did_not_have_is_null(run: Path) -> None:
    table = RunFolder(run).read_step(0)
    assert table.schema.names == [*trajectory.LEARNED_SCHEMA.names, "parts"]
    assert table.column("kl").null_count == table.column("truncated").null_count == ROWS
    assert table.schema.field("kl").type == trajectory.LEARNED_SCHEMA.field("kl").type


def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(make_run(tmp_path / "run", 1))
    table = make_step(0, ["a" * 20_000_000] * 8)
    pq.write_table(table, folder.trajectory_file(0), compression="zstd", use_dictionary=False)
    with pytest.raises(pa.ArrowInvalid, match="it unpacks to 160,00.* bytes, more than 67,108,864"):
        folder.read_step(0)
