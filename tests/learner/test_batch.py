"""Who makes which passes: each sequence once, the load by tokens, and everybody as many as the others if need be."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_ray import trajectory
from ppo_ray.errors import WorkerError
from ppo_ray.learner.batch import Layout, ResponseBatch
from ppo_ray.learner.metrics import check_staleness, summarize_sources
from ppo_ray.learner.ranks import Ranks
from tests.learning import make_table
from tests.test_trajectory import row

lengths = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40)), min_size=1, max_size=12)


@settings(deadline=None)
@given(lengths=lengths, size=st.integers(1, 4), budget=st.integers(1, 90))
def test_ranks_share_the_sequences_and_make_as_many_passes_each(
    lengths: list[tuple[int, int]], size: int, budget: int
) -> None:
    batch = ResponseBatch.from_table(make_table(len(lengths), lengths=lengths))
    everything = np.arange(len(lengths))
    layout = Layout(budget, 0, torch.device("cpu"), Ranks())
    layouts = [replace(layout, ranks=Ranks(rank, size)) for rank in range(size)]
    passes = [list(layout.passes(batch, everything)) for layout in layouts]
    in_step = [list(replace(layout, in_lockstep=True).passes(batch, everything)) for layout in layouts]
    dealt = sorted(int(index) for rank in passes for rows in rank for index in rows.sequences)
    assert dealt == everything.tolist()
    assert {len(rank) for rank in in_step} == {max(map(len, passes))}
    for mine, padded in zip(passes, in_step, strict=True):
        assert [rows.sequences.tolist() for rows in padded[: len(mine)]] == [rows.sequences.tolist() for rows in mine]
        assert all(len(rows.sequences) == 0 == len(rows.predict_at) for rows in padded[len(mine) :])


def test_the_load_is_balanced_by_tokens_and_not_by_rows() -> None:
    lengths = [(8, 40)] + [(2, 6)] * 6  # 48 tokens in one row, 48 in six
    batch = ResponseBatch.from_table(make_table(len(lengths), lengths=lengths))
    for rank, wanted in ((0, [0]), (1, [1, 2, 3, 4, 5, 6])):
        layout = Layout(1000, 0, torch.device("cpu"), Ranks(rank, 2))
        (rows,) = layout.passes(batch, np.arange(7))
        assert rows.sequences.tolist() == wanted


def make(*versions: int):
    workers = enumerate(versions)
    return trajectory.from_rows([row(10 + i, policy_version=version, worker=f"rollout-{i}") for i, version in workers])


def test_figures() -> None:
    assert check_staleness(make(3, 3), 3, 0) == {"rollout/staleness_mean": 0, "rollout/staleness_max": 0}
    assert check_staleness(make(3, 2, 2, 2), 3, 1) == {"rollout/staleness_mean": 0.75, "rollout/staleness_max": 1}


@pytest.mark.parametrize(("versions", "policy", "limit"), [((3, 2), 3, 0), ((3, 1), 3, 1), ((3, 4), 3, 1)])
def test_what_is_too_stale_or_not_yet_learnt_is_refused_by_name(versions, policy: int, limit: int) -> None:
    message = (
        f"rollout-1 sampled the trajectory of sample 11 with policy version {versions[1]}, but the learner is at "
        f"version {policy} and takes those of version {policy - limit} or later .rollout.max_staleness={limit}.; 1 of 2"
    )
    with pytest.raises(WorkerError, match=message):
        check_staleness(make(*versions), policy, limit)


def test_each_source_of_a_mixture_has_its_own_scores() -> None:
    table = make_table(5, scores=[1.0, None, 2.0, None, 4.0])
    table = table.append_column("row", pa.array([{"source": name} for name in ("a", "b", "b", "c", "b")]))
    assert summarize_sources(table, ()) == {}
    assert summarize_sources(table, ("a", "b", "c", "none")) == {
        "sources/a_unscored": 0.0,
        "sources/a_score_mean": 1.0,
        "sources/b_unscored": 1 / 3,
        "sources/b_score_mean": 3.0,
        "sources/c_unscored": 1.0,
    }
