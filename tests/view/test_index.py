"""The index of a run's trajectories: what it finds, and what it leaves out."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray.errors import InputError
from ppo_ray.run.folder import RunFolder
from ppo_ray.view.index import Query, TrajectoryIndex
from tests.view.runs import ROWS, make_run, make_step, row_of, write_step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def read(run: Path) -> TrajectoryIndex:
    index = TrajectoryIndex(RunFolder(run))
    assert index.refresh(60)
    return index


def test_a_row_sums_up_its_lists(run: Path) -> None:
    page = read(run).search(Query())
    assert page.num_matches == 3 * ROWS
    row = row_of(page, step=2, row=3)
    assert (row["tokens"], row["score"], row["kl"], row["logprob"], row["advantage"]) == (4, 3.0, 8.0, -0.5, 0.25)
    assert (row["parts.style"], row["parts.length"], row["finish_reason"]) == (1.5, 3.0, "stop")
    unscored = row_of(page, step=2, row=ROWS - 1)
    assert (unscored["score"], unscored["kl"], unscored["advantage"], unscored["logprob"]) == (None, None, None, -0.5)


def test_figures_that_are_not_finite_are_null_and_spoil_no_other_row(tmp_path: Path) -> None:
    table = make_step(0)
    kl = table.column("kl").to_pylist()
    kl[2] = [float("nan")] * 3
    kl[3] = [float("inf")] * 4
    column = pa.array(kl, pa.list_(pa.float32()))
    folder = tmp_path / "trajectories"
    folder.mkdir()
    pq.write_table(
        table.set_column(table.schema.get_field_index("kl"), table.schema.field("kl"), column),
        folder / "step-00000.parquet",
    )
    page = read(tmp_path).search(Query())
    assert [row["kl"] for row in page.rows] == [0, 0, None, None, 0, 0, 0, None]


@pytest.mark.parametrize("column", ["score", "kl", "tokens", "worker", "response", "parts.style"])
@pytest.mark.parametrize("is_descending", [False, True])
def test_sorting_is_that_of_pandas(run: Path, column: str, is_descending: bool) -> None:
    index = read(run)
    table = index.table.to_pandas()
    expected = table.sort_values(column, ascending=not is_descending, kind="stable", na_position="last")
    page = index.search(Query(sort=column, is_descending=is_descending, limit=100))
    assert [(row["step"], row["row"]) for row in page.rows] == list(zip(expected.step, expected.row, strict=True))


def test_filters_are_those_of_pandas(run: Path) -> None:
    index = read(run)
    table = index.table.to_pandas()
    query = Query(
        ranges={"score": (2.0, 5.0), "step": (1, None), "parts.length": (None, 4.5)},
        choices={"worker": "rollout-0"},
        text="RESPONSE 1",
    )
    expected = table[(table.score.between(2, 5)) & (table.step >= 1) & (table["parts.length"] <= 4.5)]
    expected = expected[(expected.worker == "rollout-0") & expected.response.str.contains("response 1")]
    page = index.search(query)
    assert page.num_matches == len(expected) == 2
    assert [row["response"] for row in page.rows] == list(expected.response)


def test_a_text_is_taken_as_it_is_and_a_pattern_as_one(tmp_path: Path) -> None:
    texts = ["a.c", "abc", "A.C!", "x", "(", "y", "z", "w"]
    index = read(make_run(tmp_path / "run", 1, {0: texts}))
    assert [row["response"] for row in index.search(Query(text="a.c")).rows] == ["a.c", "A.C!"]
    assert [row["response"] for row in index.search(Query(text="^a.c$", is_pattern=True)).rows] == ["a.c", "abc"]
    assert [row["response"] for row in index.search(Query(text="(")).rows] == ["("]
    with pytest.raises(InputError, match="no regular expression"):
        index.search(Query(text="(", is_pattern=True))


@pytest.mark.parametrize(
    "query",
    [
        Query(sort="nothing"),
        Query(ranges={"worker": (0, 1)}),
        Query(choices={"step": "1"}),
        Query(text="a", text_column="seed"),
    ],
)
def test_unknown_columns_are_refused(run: Path, query: Query) -> None:
    with pytest.raises(InputError):
        read(run).search(query)


def test_pages_follow_one_another(run: Path) -> None:
    index = read(run)
    whole = index.search(Query(sort="kl", limit=100)).rows
    pages = [index.search(Query(sort="kl", offset=offset, limit=5)).rows for offset in range(0, 3 * ROWS, 5)]
    assert [row for page in pages for row in page] == whole


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = run / "trajectories"
    whole = (folder / "step-00001.parquet").read_bytes()
    (folder / "step-00001.parquet").write_bytes(whole[: len(whole) // 2])
    newer = make_step(3).replace_schema_metadata({"ppo_ray.schema": "9"})
    pq.write_table(newer, folder / "step-00003.parquet")
    pq.write_table(pa.table({"a": [1]}), folder / "step-00004.parquet")
    (folder / "step-00005.parquet").write_bytes(b"")
    (folder / ".step-00006.parquet.abc.partial").write_bytes(whole)
    (folder / "step-00007.parquet").symlink_to(tmp_path / "outside.parquet")
    write_step(run, 8).replace(tmp_path / "outside.parquet")
    index = read(run)
    assert {row["step"] for row in index.search(Query(limit=100)).rows} == {0, 2}
    assert set(index.skipped) == {f"step-0000{step}.parquet" for step in (1, 3, 4, 5, 7)}
    assert re.search("version 9;.* versions 1 and 2", index.skipped["step-00003.parquet"])
    # a file that was half-written when it was read first
    (folder / "step-00001.parquet").write_bytes(whole)
    assert index.refresh(60)
    assert {row["step"] for row in index.search(Query(limit=100)).rows} == {0, 1, 2}
    assert "step-00001.parquet" not in index.skipped


def test_steps_that_come_or_go_are_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    index = read(run)
    write_step(run, 1, ["new"] * ROWS)
    assert index.refresh(60) and index.search(Query(text="new")).num_matches == ROWS
    write_step(run, 1, ["other and longer"] * ROWS)  # a run that went on from before
    assert index.refresh(60) and index.search(Query(text="new")).num_matches == 0
    (run / "trajectories" / "step-00001.parquet").unlink()
    assert index.refresh(60) and index.search(Query()).num_matches == ROWS


def test_reading_is_spread_over_calls(run: Path) -> None:
    index = TrajectoryIndex(RunFolder(run))
    assert not index.refresh(0)
    assert index.progress == (1, 3)
    assert not index.refresh(0)
    assert index.refresh(0)
    assert index.search(Query()).num_matches == 3 * ROWS


def test_a_run_without_steps_has_no_rows(tmp_path: Path) -> None:
    index = read(tmp_path)
    assert index.search(Query(sort="kl", text="a")).num_matches == 0
    assert index.describe()["num_rows"] == 0


def test_the_same_prompt_is_found_in_every_step(run: Path) -> None:
    page = read(run).find_prompt("prompt 3", 2)
    assert (page.num_matches, [row["step"] for row in page.rows]) == (3, [0, 1])


def test_means_and_sums_are_those_of_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = make_step(0)
    values = [rng.normal(size=index + 1).astype(np.float32) for index in range(ROWS)]
    for name in ("kl", "rollout_logprobs"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, pa.list_(pa.float32())))
    (tmp_path / "trajectories").mkdir()
    pq.write_table(table, tmp_path / "trajectories" / "step-00000.parquet")
    found = pd.DataFrame(read(tmp_path).search(Query()).rows)
    np.testing.assert_allclose(found.kl, [value.sum() for value in values], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logprob, [value.mean() for value in values], rtol=1e-5, atol=1e-6)
