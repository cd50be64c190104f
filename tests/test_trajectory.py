import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray import trajectory


def row(sample_id: int = 0, response_ids: tuple[int, ...] = (5, 6, 0), **changes: object) -> dict[str, object]:
    return {
        "sample_id": sample_id,
        "step": 3,
        "policy_version": 3,
        "worker": "rollout-0",
        "seed": 11,
        "prompt": "a film",
        "response": " I liked",
        "prompt_ids": (1, 2),
        "response_ids": response_ids,
        "rollout_logprobs": [-0.5] * len(response_ids),
        "finish_reason": "stop",
        **changes,
    }


def test_scores_start_as_null_and_failures_stay_null() -> None:
    table = trajectory.from_rows([row(0), row(1), row(2), row(3)])
    assert table.column("score").null_count == 4
    scored = trajectory.with_scores(table, [0.0, None, float("nan"), -1.5])
    assert scored.column("score").to_pylist() == [0.0, None, None, -1.5]  # a score of 0.0 is a score
    assert scored.column("truncated").null_count == 4
    assert scored.schema.equals(trajectory.SCHEMA, check_metadata=True)
    cut = trajectory.with_scores(table, [0.0] * 4, [False, True, False, True])
    assert cut.column("truncated").to_pylist() == [False, True, False, True]
    assert cut.schema.equals(trajectory.SCHEMA, check_metadata=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(7, rollout_logprobs=[-0.5]), "sample 7: 3 response tokens but 1 log-probabilities"),
        (row(7, response_ids=(), rollout_logprobs=[]), "sample 7: the response has no token"),
        (row(7, prompt_ids=()), "sample 7: the prompt has no token"),
        (row(7, worker=None), "column 'worker' has 1 nulls"),
    ],
)
def test_refuses_what_the_exchange_does_not_promise(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory.from_rows([row(0), bad])


def test_refuses_another_schema() -> None:
    with pytest.raises(ValueError, match="schema version 2"):
        trajectory.validate(trajectory.from_rows([row()]).replace_schema_metadata({"ppo_ray.schema": "0"}))
    with pytest.raises(ValueError, match="2 scores for 1"):
        trajectory.with_scores(trajectory.from_rows([row()]), [1.0, 2.0])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_ragged_reads_rows_across_shards_and_slices(sizes: list[int], num_shards: int, skip: int) -> None:
    rows = [row(i, tuple(range(size))) for i, size in enumerate(sizes)]
    shards = [trajectory.from_rows(rows[i::num_shards]) for i in range(num_shards) if rows[i::num_shards]]
    table = trajectory.concat(shards).slice(skip)
    expected = [list(ids) for ids in table.column("response_ids").to_pylist()]
    assert [ids.tolist() for ids in trajectory.ragged(table, "response_ids")] == expected
    assert trajectory.lengths(table, "response_ids").tolist() == [len(ids) for ids in expected]


def test_ragged_is_a_view() -> None:
    table = trajectory.from_rows([row()])
    (logprobs,) = trajectory.ragged(table, "rollout_logprobs")
    assert not logprobs.flags.writeable
    assert logprobs.dtype == np.float32


def test_learned_figures_join_the_record() -> None:
    table = trajectory.with_scores(trajectory.from_rows([row(0), row(1)]), [1.0, None])
    figures = {name: [np.float32([1, 2, 3]), None] for name in trajectory.LEARNED_FIELDS}
    learned = trajectory.with_learned(table, figures)
    assert learned.schema.equals(trajectory.LEARNED_SCHEMA)
    assert learned.column("advantages").to_pylist() == [[1.0, 2.0, 3.0], None]
    assert pa.types.is_float32(learned.schema.field("values").type.value_type)


def test_a_group_has_a_name_in_every_row() -> None:
    rows = [row(0), row(1)]
    named = trajectory.from_rows(rows, pa.table({"group_id": pa.array([0, 0], pa.int64())}))
    assert trajectory.with_scores(named, [1.0, 2.0]).column("group_id").to_pylist() == [0, 0]
    for wrong in (pa.array([0, None], pa.int64()), pa.array([0, 0], pa.int32())):
        with pytest.raises(ValueError, match="trajectory column 'group_id' is int"):
            trajectory.from_rows(rows, pa.table({"group_id": wrong}))
