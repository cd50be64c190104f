"""What may forbid an optimizer step, and what happens then."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_ray.learner.batch import ResponseBatch
from ppo_ray.learner.experience import estimate, run_models
from ppo_ray.learner.minibatch import MinibatchUpdater
from tests.learning import largest_difference, make_learner, make_table, weights


def test_a_mini_batch_beyond_the_ratio_threshold_takes_no_step(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy, epochs=2, ratio_threshold=0.5)  # even the first ratio, 1, exceeds it
    before = weights(learner)
    metrics = learner.update(make_table(), 0).metrics
    assert (metrics["policy/skipped_minibatches"], metrics["policy/optimizer_steps"]) == (2, 0)
    assert largest_difference(before, weights(learner)) == 0


def test_after_a_step_a_skipped_mini_batch_still_moves_nothing_unless_asked_to_as_trl(tiny_policy: Path) -> None:
    """TRL steps with a loss of zero: Adam's momentum moves the weights on."""
    moved = {}
    for mode in ("skip", "zero_loss"):
        learner = make_learner(tiny_policy, epochs=1)
        learner.update(make_table(), 0)
        learner._updater._ppo = learner._ppo.model_copy(update={"ratio_threshold": 0.5, "ratio_exceeded": mode})
        before = weights(learner)
        report = learner.update(make_table(), 1).minibatches[0]
        moved[mode] = largest_difference(before, weights(learner))
        assert report.outcome == ("ratio_exceeded" if mode == "skip" else "stepped")
        assert (report.metrics["loss/policy"] == 0) == (mode == "zero_loss")
    assert moved["skip"] == 0
    assert moved["zero_loss"] > 1e-5


def test_zero_loss_zeroes_the_parts_whose_ratio_exceeds_alone(tiny_policy: Path) -> None:
    """Whatever the micro-batch budget: whether a part exceeds is known only after all of its passes."""
    results = []
    for budget, threshold in ((16, 9.0), (4096, 9.0), (4096, 1e9), (4096, 0.5)):
        options = {"loss_aggregation": "microbatch_mean", "gradient_accumulation": 4, "ratio_exceeded": "zero_loss"}
        learner = make_learner(tiny_policy, budget, epochs=3, ratio_threshold=threshold, **options)
        results.append(learner.update(make_table(), 0).minibatches[2].metrics["loss/policy"])
    small, large, nothing_exceeds, all_exceeds = results
    assert small == pytest.approx(large, abs=1e-6)
    assert abs(large - nothing_exceeds) > 1e-3
    assert large != 0 == all_exceeds


def test_stopping_before_the_step_that_starts_too_far_away(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy, epochs=4, early_stopping="before_step", early_stopping_kl=1e-4)
    update = learner.update(make_table(), 0)
    outcomes = [report.outcome for report in update.minibatches]
    assert outcomes[-1] == "early_stopped" and outcomes[:-1] == ["stepped"] * (len(outcomes) - 1)
    assert 1 < len(outcomes) <= 4
    last, before = (report.metrics["policy/kl"] for report in reversed(update.minibatches[-2:]))
    assert last > 1.5e-4 >= before
    assert update.metrics["policy/early_stopped"] == 1
    assert update.metrics["policy/optimizer_steps"] == len(outcomes) - 1


def test_stopping_after_the_epoch_as_trl(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy, epochs=4, early_stopping="after_epoch", early_stopping_kl=1e-4)
    update = learner.update(make_table(), 0)
    outcomes = [report.outcome for report in update.minibatches]
    assert outcomes == ["stepped"] * len(outcomes) and 1 < len(outcomes) < 4  # the step beyond was made
    last, before = (report.metrics["policy/kl"] for report in reversed(update.minibatches[-2:]))
    assert last > 1.5e-4 >= before
    assert update.metrics["policy/early_stopped"] == 1


def test_without_early_stopping_nothing_stops(tiny_policy: Path) -> None:
    update = make_learner(tiny_policy, epochs=3, early_stopping_kl=1e-9).update(make_table(), 0)
    assert (len(update.minibatches), update.metrics["policy/early_stopped"]) == (3, 0)


def test_what_is_not_finite_is_skipped_and_counted_if_asked(tiny_policy: Path) -> None:
    options = {"value_clip_range": 1e30, "on_nonfinite": "skip", "epochs": 1, "minibatch_size": 2}
    learner = make_learner(tiny_policy, whiten_advantages=False, **options)
    before = weights(learner)
    metrics = learner.update(make_table(4, [1e30, -1e30, 1e30, 3e38]), 3).metrics
    assert metrics["policy/nonfinite_minibatches"] >= 1
    assert metrics["policy/nonfinite_minibatches"] + metrics["policy/optimizer_steps"] == 2
    assert all(np.isfinite(tensor).all() for tensor in weights(learner).values())
    learner.update(make_table(4), 4)  # and it learns on
    assert largest_difference(before, weights(learner)) > 1e-5


def test_the_reported_norm_is_that_of_the_whole_mini_batch(tiny_policy: Path) -> None:
    norms = [
        make_learner(tiny_policy, epochs=1, gradient_accumulation=parts)
        .update(make_table(), 0)
        .minibatches[0]
        .grad_norm
        for parts in (1, 2, 4)
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host would wait on a GPU: numbers, and shapes that go by values."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        )
        if func.overloadpacket is torch.ops.aten.index:
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        self.number += waits
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", [{}, {"kl_in": "loss", "kl_estimator": "k3", "policy_loss": "gspo"}])
def test_the_host_does_not_wait_for_the_device_in_a_micro_batch(tiny_policy: Path, options: dict[str, Any]) -> None:
    waits, passes = [], []
    for budget in (16, 10**6):
        learner = make_learner(tiny_policy, budget, epochs=1, **options)
        count = learner._updater._accumulate
        counter = Waits()

        def accumulate(*arguments: Any, count: Any = count, counter: Any = counter) -> Any:
            with counter:
                return count(*arguments)

        learner._updater._accumulate = accumulate  # type: ignore[method-assign]
        batch = ResponseBatch.from_table(make_table(12))
        passes.append(learner._updater._layout.num_passes(batch))
        learner.update(make_table(12), 0)
        waits.append(counter.number)
    assert passes[0] > 5 and passes[1] == 1
    assert waits[0] == waits[1]
    with Waits() as counter:
        assert torch.ones(2)[torch.ones(2).bool()].sum().item() == 2
    assert counter.number == 2


@pytest.mark.parametrize("options", [{}, {"kl_estimator": "full", "importance_cap": 2.0, "advantages": "rloo"}])
def test_no_pass_reads_what_is_on_the_device(
    tiny_policy: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the meta device have no values: whoever reads one, or lets a shape go by values, fails."""
    learner, meta = make_learner(tiny_policy, 16, **options), torch.device("meta")
    ppo, batch = learner._ppo, ResponseBatch.from_table(make_table(12, group_size=2))
    on_host, _ = run_models(learner._policy, learner._reference, batch, learner._layout, ppo)
    experience = estimate(on_host, batch, ppo, 0.2, learner._moments)  # reads, once per update, before the passes
    moved = {name: tensor.to(meta) for name, tensor in vars(experience).items() if tensor is not None}
    models, layout = (learner._policy.to(meta), learner._reference.to(meta)), replace(learner._layout, device=meta)
    assert layout.num_passes(batch) > 5
    outputs, _ = run_models(*models, batch, layout, ppo)
    monkeypatch.setattr("ppo_ray.learner.minibatch._Sums.report", lambda sums: None)  # once per mini-batch
    updater = MinibatchUpdater(models[0], learner._sharding, learner._optimizer, ppo, layout)
    updater._accumulate(batch, replace(experience, **moved), np.arange(12), 0.2, False, None)
    reads: tuple[Callable[[torch.Tensor], object], ...] = (float, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero)
    for read in reads:
        with pytest.raises((NotImplementedError, RuntimeError)):
            read(outputs.kl.sum())
