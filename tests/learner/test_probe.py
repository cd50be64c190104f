from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ppo_ray import trajectory
from ppo_ray.learner.batch import ResponseBatch
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.weights.acks import Agreement
from ppo_ray.weights.snapshot import Wire
from tests.learning import largest_difference, make_learner, make_table, weights


def answered(table: pa.Table, logprobs: torch.Tensor) -> pa.Table:
    """Return the table as if an engine had sampled its tokens with these log-probabilities, `[B, R]`."""
    batch = ResponseBatch.from_table(table)
    rows = [row[: len(ids)].float().tolist() for row, ids in zip(logprobs, batch.response_ids, strict=True)]
    index = table.schema.get_field_index("rollout_logprobs")
    return table.set_column(index, trajectory.SCHEMA.field(index), pa.array(rows, pa.list_(pa.float32())))


def moved_weights(learner: PPOLearner, wire: Wire | None = None) -> dict[str, torch.Tensor]:
    with learner.probe(wire).move():
        return weights(learner)


def test_every_tensor_is_moved_and_put_back(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy)
    before = weights(learner)
    moved = moved_weights(learner)
    assert largest_difference(before, weights(learner)) == 0
    for name, tensor in moved.items():
        relative = float((tensor - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt())
        assert relative == pytest.approx(0.1, rel=0.2), name


def test_the_move_is_drawn_where_the_policy_is(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host draws billions of normals in minutes; a device that can draw none shows where it is done."""
    learner = make_learner(tiny_policy)
    monkeypatch.setattr(type(learner._policy), "device", torch.device("meta"))
    with pytest.raises(RuntimeError, match="META device type"), learner.probe().move():
        raise AssertionError("drawn elsewhere")


def test_moved_weights_are_those_that_arrive(tiny_policy: Path) -> None:
    """So that what a wire rounds away is no difference between engine and learner."""
    learner = make_learner(tiny_policy)
    moved = moved_weights(learner, Wire("bfloat16"))
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in moved.values())
    assert 0 < largest_difference(moved, moved_weights(learner)) < 0.01


def test_an_engine_that_serves_what_it_was_sent_is_told_from_one_that_does_not(tiny_policy: Path) -> None:
    learner, table = make_learner(tiny_policy), make_table(6)
    probe, batch = learner.probe(), ResponseBatch.from_table(table)
    with probe.move():
        served = probe._logprobs(batch)
    stale = probe._logprobs(batch)
    workers = pa.array(["rollout-0", "rollout-1"] * 3)
    index = table.schema.get_field_index("worker")
    mixed = torch.where(torch.tensor([True, False] * 3)[:, None], served, stale)
    table = answered(table.set_column(index, trajectory.SCHEMA.field(index), workers), mixed)
    before = weights(learner)
    good, bad = probe.compare(table)
    assert largest_difference(before, weights(learner)) == 0
    assert (good.worker, bad.worker) == ("rollout-0", "rollout-1")
    assert good.to_moved < 1e-6 and bad.to_own < 1e-6
    assert good.to_own == pytest.approx(good.move, rel=1e-3) and good.move > 0.01
    assert good.problem("float32") is None
    assert "rollout-1" in (wrong := bad.problem("float32")) and "it still computes with those before" in wrong


@pytest.mark.parametrize(
    ("found", "dtype", "said"),
    [
        (Agreement("w", 1e-5, 0.5, 0.5), "float32", None),
        (Agreement("w", 0.03, 0.5, 0.5), "bfloat16", None),
        (Agreement("w", 0.03, 0.5, 0.5), "float32", "at most 0.001 in float32"),
        (Agreement("w", float("nan"), 0.5, 0.5), "float32", "nan nats per token off"),
        (Agreement("w", 5e-4, 1e-3, 1e-3), "float32", "cannot be told"),
    ],
)
def test_what_counts_as_agreement(found: Agreement, dtype: str, said: str | None) -> None:
    problem = found.problem(dtype)
    assert (problem is None) == (said is None)
    assert said is None or said in problem


def test_a_tensor_of_zeros_is_moved_too(tiny_policy: Path) -> None:
    probe = make_learner(tiny_policy).probe()
    parameter = next(iter(probe.policy.causal_lm.parameters()))
    with torch.no_grad():
        parameter.zero_()
    with replace(probe, seed=3).move():
        assert float(parameter.abs().max()) > 0
    assert not np.any(parameter.detach().numpy())
