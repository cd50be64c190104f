"""Every estimator of advantages and every loss of the policy through the learner, a user's own loss included."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.config import UpdateConfig
from ppo_ray.errors import InputError, WorkerError
from ppo_ray.learner.batch import ResponseBatch, split_groups
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.surrogate import make_surrogate
from tests.learner.test_invariance import same
from tests.learning import (
    largest_difference,
    load_learner,
    make_float64_learner,
    make_learner,
    make_table,
    weights,
)

OWN = "tests.learner.test_algorithms:mean_ratio"
IN_LOSS = {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.1}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "vapo": {"gae_lambda_value": 1.0, "gae_length_alpha": 0.3},
    "grpo": {"advantages": "grpo", "loss_aggregation": "sequence_mean", **IN_LOSS},
    "dr_grpo": {"advantages": "dr_grpo", "loss_aggregation": "sequence_sum", "loss_length": 12},
    "rloo, own loss": {"advantages": "rloo", "policy_loss": OWN, "importance_cap": 2.0},
    "reinforce, cispo": {"advantages": "reinforce", "gamma": 0.9, "policy_loss": "cispo", "clip_range_high": 1e-3},
    "baseline, gspo": {"advantages": "reinforce_baseline", "policy_loss": "gspo", "clip_range": 1e-3, **IN_LOSS},
    "gae, gspo": {"policy_loss": "gspo", "loss_aggregation": "sequence_mean"},
}
NUM_ROWS, GROUP = 12, 3


def mean_ratio(logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **others: torch.Tensor) -> Any:
    """A loss of the user's own: the ratio of a token, held by that of its whole row."""
    moved = logprobs - others["old_logprobs"]
    mean = moved.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return -advantages * torch.sigmoid(moved + mean)


def clip(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))


def updated(learner: PPOLearner, order: Any = None, rows: Any = None) -> tuple[Any, dict[str, float]]:
    """Make two updates, the second from another place than the reference."""
    table = make_table(NUM_ROWS, group_size=GROUP)
    for step in (4, 5):
        report = learner.update(table if rows is None else table.take(rows), step, order)
    return weights(learner), {name: value for name, value in report.metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_passes_parts_and_order_change_nothing(tiny_policy: Path, name: str) -> None:
    whole = updated(make_float64_learner(tiny_policy, 10**6, **ALGORITHMS[name]))
    rng = np.random.default_rng(len(name))
    split = make_float64_learner(tiny_policy, 20, gradient_accumulation=4, **ALGORITHMS[name])
    same(updated(split, lambda epoch: rng.permutation(NUM_ROWS)), whole)
    turned = make_float64_learner(tiny_policy, 10**6, **ALGORITHMS[name])
    same(updated(turned, rows=rng.permutation(NUM_ROWS)), whole)
    plain = make_float64_learner(tiny_policy, 10**6)
    assert largest_difference(updated(plain)[0], whole[0]) > 1e-6  # the options do something


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_the_number_of_ranks_and_their_sharding_change_nothing(tiny_policy: Path, crew: Any, sharding: str) -> None:
    """Also where ranks have nothing to do: the second mini-batch is smaller than the ranks are many."""
    for name in ("dr_grpo", "rloo, own loss", "reinforce, cispo", "baseline, gspo"):
        alone = work_on(None, tiny_policy, name, "ddp")
        for found in crew.run(work_on, tiny_policy, name, sharding):
            assert not isinstance(found, str), found
            same(found, alone)


def work_on(ranks: Ranks | None, folder: Path, name: str, sharding: str) -> tuple[Any, dict[str, float]]:
    learner = {"sharding": sharding, "microbatch_tokens": 30}
    ppo = {"learning_rate": 1e-4, "minibatch_size": 6, "epochs": 2} | ALGORITHMS[name]
    rank = load_learner(folder, {"dtype": "float64"}, learner, ppo, ranks)
    metrics = rank.update(make_table(8, group_size=4), 0).metrics
    return weights(rank), {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("grpo", [0.707106, -0.707106, -0.707106, 0.707106, 0, 0]),
        ("dr_grpo", [0.5, -0.5, -0.75, 0.75, 0, 0]),
        ("rloo", [1.0, -1.0, -1.5, 1.5, 0, 0]),
    ],
)
def test_a_response_is_compared_with_those_to_its_prompt(
    tiny_policy: Path, estimator: str, wanted: list[float]
) -> None:
    """Whatever whitening of a step's advantages is for other estimators."""
    learner = make_learner(tiny_policy, advantages=estimator)
    table = learner.update(make_table(6, [1.0, 0.0, 0.5, 2.0, 0.1, 0.1], group_size=2), 0).trajectories
    for found, value in zip(table.column("advantages").to_pylist(), wanted, strict=True):
        assert found == pytest.approx([value] * len(found), abs=1e-5)
    assert all(value == 0 for row in table.column("advantages").to_pylist()[4:] for value in row)
    assert table.column("values").null_count == table.column("returns").null_count == 6


def test_the_kl_in_the_reward_is_a_part_of_the_compared_return(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy, advantages="dr_grpo", kl_coef=0.5, epochs=2)
    learner.update(make_table(6, group_size=3), 0)
    table = learner.update(make_table(6, group_size=3), 1).trajectories
    returns = np.array([sum(row) for row in table.column("rewards").to_pylist()]).reshape(2, 3)
    wanted = (returns - returns.mean(1, keepdims=True)).ravel()
    found = [row[0] for row in table.column("advantages").to_pylist()]
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
    scores = np.array(table.column("score").to_pylist()).reshape(2, 3)
    assert abs(wanted - (scores - scores.mean(1, keepdims=True)).ravel()).max() > 1e-3


def test_without_values_there_is_nothing_of_them(tiny_policy: Path, tmp_path: Path) -> None:
    learner = make_learner(tiny_policy, advantages="reinforce")
    assert not [name for name, _ in learner._policy.named_parameters() if not name.startswith("causal_lm.")]
    assert [len(group["params"]) for group in learner._optimizer.param_groups] == [20]
    metrics = learner.update(make_table(), 0).metrics
    assert not [name for name in metrics if name.startswith(("value/", "returns/")) or name == "loss/value"]
    assert learner.value_head() == {}
    learner.save(tmp_path)
    assert not (tmp_path / "value_head").exists()
    again = load_learner(tiny_policy, {}, {}, {"advantages": "reinforce"}, checkpoint=tmp_path)
    assert again.policy_version == 1
    with_values = make_learner(tiny_policy)
    with pytest.raises(InputError, match="ppo.advantages=rloo is for another policy: CausalLMWithValueHead"):
        PPOLearner(with_values._policy, with_values._reference, UpdateConfig(advantages="rloo"))


def test_ones_own_loss_that_is_ppos_is_ppos_update(tiny_policy: Path) -> None:
    own, plain = (make_learner(tiny_policy, **options) for options in ({"policy_loss": f"{__name__}:clip"}, {}))
    for learner in (own, plain):
        for step in (0, 1):
            metrics = learner.update(make_table(), step).metrics
    assert largest_difference(weights(own), weights(plain)) == 0
    assert "policy/clip_fraction" in metrics
    assert "policy/clip_fraction" not in own.update(make_table(), 2).metrics  # nobody knows it


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda logprobs: logprobs.mean(1), r"returned torch.float32 \(8,\); a loss per token is torch.float32 \(8, "),
        (lambda logprobs: logprobs.double(), r"returned torch.float64 \(8, "),
        (lambda logprobs: 0.0, "returned a float; a loss per token"),
        (lambda logprobs: logprobs.detach(), "does not depend on logprobs; nothing is learnt"),
        (
            lambda logprobs: (logprobs + 1e3).exp(),
            r"tokens' losses are not finite; the first is token 1 of its response",
        ),
        (lambda logprobs: [][0], "raised IndexError: list index out of range"),
    ],
)
def test_what_is_no_loss_per_token_is_an_error_that_names_the_function(
    tiny_policy: Path, result: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "wrong", lambda logprobs: result(logprobs))
    learner = make_learner(tiny_policy, policy_loss=f"{__name__}:wrong")
    before = weights(learner)
    with pytest.raises(WorkerError, match=f"ppo.policy_loss='{__name__}:wrong': .*{message}"):
        learner.update(make_table(), 0)
    assert largest_difference(before, weights(learner)) == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logprobs, rewards: None, r"nothing is known for its parameters \(rewards\); there are logprobs, old_"),
        (lambda mask: None, "without logprobs nothing is learnt"),
        (3, "is a int, not a function"),
    ],
)
def test_a_function_with_other_parameters_is_refused(
    function: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "wrong", function)
    with pytest.raises(InputError, match=f"ppo.policy_loss='{__name__}:wrong': .*{message}"):
        make_surrogate(UpdateConfig(policy_loss=f"{__name__}:wrong"))


@pytest.mark.parametrize("loss", ["clip", "gspo", OWN])
@given(seed=st.integers(0, 2**31))
def test_gradients_agree_with_finite_differences(loss: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, noise = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    advantages = torch.randn(3, 1, generator=generator, dtype=torch.float64).expand(3, 4)
    mask = torch.arange(4)[None] < torch.tensor([[4], [1], [2]])
    weights_of = torch.tensor([0.125, 0.5, 0.25], dtype=torch.float64)
    surrogate = make_surrogate(UpdateConfig(policy_loss=loss, clip_range=50.0))  # no kink is near

    def value(new: torch.Tensor) -> torch.Tensor:
        return surrogate(new, old, advantages, mask, weights_of, importance=None).loss

    new = (old + 0.3 * noise).requires_grad_()
    (gradient,) = torch.autograd.grad(value(new), new)
    assert gradient[~mask].eq(0).all()
    for row, column in mask.nonzero().tolist():
        step = torch.zeros_like(new)
        step[row, column] = 1e-6
        slope = float(value(new.detach() + step) - value(new.detach() - step)) / 2e-6
        assert float(gradient[row, column]) == pytest.approx(slope, abs=1e-6)


def test_flat_groups_that_are_dropped_are_as_good_as_absent(tiny_policy: Path) -> None:
    scores = [0.5, 0.5, 1.0, 2.0, None, 1.0, None, None, 3.0, 1.0]
    table = make_table(10, scores, group_size=2)  # flat are the first, and the third, of which one alone has a score
    dropped, absent = (make_learner(tiny_policy, advantages="rloo") for _ in range(2))
    report = dropped.update(table, 0, drop_flat=True)
    absent.update(table.filter(pc.is_in(table.column("group_id"), pc.cast([1, 4], "int64"))), 0)
    assert largest_difference(weights(dropped), weights(absent)) == 0
    assert report.metrics["groups/flat_fraction"] == pytest.approx(2 / 4)  # of those that have a score
    assert report.metrics["groups/num_learned"] == 2
    assert report.metrics["score/mean"] == pytest.approx(9 / 7)  # as they were given, all of them
    learned = report.trajectories.column("advantages").to_pylist()
    assert [row is not None for row in learned] == [False, False, True, True, *[False] * 4, True, True]
    kept = make_learner(tiny_policy, advantages="rloo").update(table, 0).metrics
    assert (kept["groups/flat_fraction"], kept["groups/num_learned"]) == (0.5, 4)


def test_a_step_of_flat_groups_alone_is_skipped(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy, advantages="grpo")
    before = weights(learner)
    metrics = learner.update(make_table(4, [1.0, 1.0, 0.0, 0.0], group_size=2), 0, drop_flat=True).metrics
    assert (metrics["learner/skipped_update"], metrics["groups/num_learned"], metrics["score/mean"]) == (1, 0, 0.5)
    assert largest_difference(before, weights(learner)) == 0


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), size=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_mini_batches_are_whole_groups(sizes: list[int], size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(rng.permutation(100)[: len(sizes)], sizes)
    order = rng.permutation(len(groups))
    parts = split_groups(order, groups, size)
    assert sorted(np.concatenate(parts)) == list(range(len(groups)))
    found = [set(groups[part]) for part in parts]
    assert sum(map(len, found)) == len(sizes) and all(found)  # none is in two parts
    assert max(map(len, found)) - min(map(len, found)) <= 1
    singles = split_groups(order, np.arange(len(groups)), size)
    for part, wanted in zip(singles, np.array_split(order, -(-len(order) // size)), strict=True):
        assert part.tolist() == wanted.tolist()


def test_groups_stay_whole_where_responses_are_compared(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for estimator, whole in (("rloo", True), ("reinforce", False)):
        learner = make_learner(tiny_policy, advantages=estimator, minibatch_size=6, epochs=3)
        seen: list[np.ndarray] = []
        update = learner._updater.update

        def watch(
            batch: ResponseBatch, experience: Any, sequences: np.ndarray, *rest: Any, update: Any = update
        ) -> Any:
            seen.append(np.unique(batch.groups[sequences]))  # noqa: B023
            return update(batch, experience, sequences, *rest)

        monkeypatch.setattr(learner._updater, "update", watch)
        learner.update(make_table(NUM_ROWS, group_size=GROUP), 0)
        assert len(seen) == 6 and (max(map(len, seen)) == 2) == whole
