"""What must not change an update: its split over passes, parts or ranks, and the order of its rows. In float64."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_ray.learner import PPOLearner
from ppo_ray.ranks import Ranks
from tests.learning import largest_difference, make_float64_learner, make_table, weights

FULL = {  # everything that adds to the loss, all at once
    "whiten_rewards": "tokens",
    "max_grad_norm": 0.01,
    "entropy_coef": 0.1,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "importance_cap": 2.0,
    "loss_aggregation": "sequence_mean",
    "score_scaling": "mean_std",
}
NUM_ROWS = 12


def updated(learner: PPOLearner, order: Any = None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Make two updates, the second from another place than the reference."""
    learner.update(make_table(NUM_ROWS), 4, order)
    metrics = learner.update(make_table(NUM_ROWS), 5, order).metrics
    return weights(learner), {name: value for name, value in metrics.items() if not name.startswith("time/")}


def same(first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    assert largest_difference(first[0], second[0]) < 1e-10
    assert first[1].keys() == second[1].keys()
    for name, value in first[1].items():
        assert second[1][name] == pytest.approx(value, rel=1e-8, abs=1e-8), name


@pytest.fixture(scope="module")
def whole(tiny_policy: Path) -> dict[str, tuple[Any, Any]]:
    """Return the update made in one pass, for each set of options."""
    return {
        name: updated(make_float64_learner(tiny_policy, 10**6, **options))
        for name, options in (("default", {}), ("full", FULL))
    }


slow_examples = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("options", ["default", "full"])
@slow_examples
@given(budget=st.integers(8, 200), parts=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_passes_parts_and_order_change_nothing(
    tiny_policy: Path, whole: Any, options: str, budget: int, parts: int, seed: int
) -> None:
    learner = make_float64_learner(
        tiny_policy, budget, gradient_accumulation=parts, **(FULL if options == "full" else {})
    )
    same(updated(learner, lambda epoch: np.random.default_rng([seed, epoch]).permutation(NUM_ROWS)), whole[options])


@slow_examples
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_tables_rows_changes_nothing(tiny_policy: Path, whole: Any, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(NUM_ROWS)
    learner = make_float64_learner(tiny_policy, 10**6)
    for step in (4, 5):
        metrics = learner.update(make_table(NUM_ROWS).take(order), step).metrics
    figures = {name: value for name, value in metrics.items() if not name.startswith("time/")}
    same((weights(learner), figures), whole["default"])


def test_as_trl_the_split_does_change_the_update(tiny_policy: Path, whole: Any) -> None:
    """Which is why it is not the default; and the tests above could fail."""
    learner = make_float64_learner(tiny_policy, loss_aggregation="microbatch_mean", gradient_accumulation=4)
    assert largest_difference(updated(learner)[0], whole["default"][0]) > 1e-5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("options", ["default", "full"])
def test_the_number_of_ranks_changes_nothing(
    tiny_policy: Path, tmp_path: Path, whole: Any, size: int, options: str
) -> None:
    """Real processes and gloo; a mini-batch of one pass leaves ranks without work."""
    arguments = (size, str(tmp_path), str(tiny_policy), FULL if options == "full" else {})
    torch.multiprocessing.spawn(run_rank, arguments, nprocs=size)
    for rank in range(size):
        same(torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True), whole[options])


def run_rank(rank: int, size: int, folder: str, policy: str, options: dict[str, Any]) -> None:
    """Make the same update as one of several ranks."""
    torch.set_num_threads(1)
    os.environ["USE_LIBUV"] = "0"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    learner = make_float64_learner(Path(policy), 60, ranks=Ranks(rank, size), **options)
    torch.save(updated(learner), Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()
