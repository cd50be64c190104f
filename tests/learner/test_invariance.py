"""What must not change an update: its split over passes, parts or ranks, and the order of its rows. In float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_ray.config import LoraConfig
from ppo_ray.learner import batch as learner_batch
from ppo_ray.learner.batch import ResponseBatch
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models import packing
from ppo_ray.models.packing import SHORTEST_SHARED, join_prompts
from tests.learning import largest_difference, load_learner, make_float64_learner, make_table, weights

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
LORA = LoraConfig(rank=4)


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
        name: updated(make_float64_learner(tiny_policy, 10**6, lora=lora, **options))
        for name, lora, options in (("default", None, {}), ("full", None, FULL), ("lora", LORA, FULL))
    }


slow_examples = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("options", ["default", "full", "lora"])
@slow_examples
@given(budget=st.integers(8, 200), parts=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_passes_parts_and_order_change_nothing(
    tiny_policy: Path, whole: Any, options: str, budget: int, parts: int, seed: int
) -> None:
    ppo, lora = {} if options == "default" else FULL, LORA if options == "lora" else None
    learner = make_float64_learner(tiny_policy, budget, lora=lora, gradient_accumulation=parts, **ppo)
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


Case = tuple[list[tuple[int, int]], int, dict[str, Any], dict[str, Any], dict[str, Any]]
"""Lengths of prompts and responses, tokens of a micro-batch, and options of model, learner and ppo."""

SEPARATE, RECOMPUTE, AT_ONCE = (
    {"critic": "separate"},
    {"gradient_checkpointing": True},
    {"reduce_gradients": "minibatch"},
)
ADAPTERS = {"lora": LORA}
SMALL_STEPS = {"minibatch_size": 3, "max_grad_norm": 0.01}
HEAD_ONLY = {"value_warmup_steps": 1}
PARTS = {"gradient_accumulation": 2, "ratio_exceeded": "zero_loss", "ratio_threshold": 1.0001, "epochs": 3}
cases = st.tuples(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 12)), min_size=2, max_size=9),
    st.integers(8, 80),
    st.sampled_from([{}, SEPARATE, ADAPTERS, SEPARATE | ADAPTERS]),
    st.sampled_from([{}, RECOMPUTE, AT_ONCE]),
    st.sampled_from([{}, SMALL_STEPS, HEAD_ONLY, PARTS, FULL, {"kl_estimator": "full"}]),
)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases)
@example(case=([(3, 4), (2, 1)], 80, {}, {}, SMALL_STEPS))  # fewer sequences than ranks
@example(
    case=([(8, 40), *[(1, 2)] * 6], 10, {}, RECOMPUTE | AT_ONCE, PARTS)
)  # one long, many short: other numbers of passes
@example(case=([(2, 5), (8, 9), (1, 1), (4, 12)], 20, SEPARATE, AT_ONCE, HEAD_ONLY | SMALL_STEPS))
@example(case=([(3, 4), (2, 1)], 80, ADAPTERS, AT_ONCE, {"kl_estimator": "full"} | SMALL_STEPS))
@example(case=([(8, 40), *[(1, 2)] * 6], 10, SEPARATE | ADAPTERS, RECOMPUTE, FULL))
def test_the_number_of_ranks_and_their_sharding_change_nothing(tiny_policy: Path, crew: Any, case: Case) -> None:
    """Real processes and gloo."""
    alone = work_on(None, tiny_policy, case, "float64", "ddp")
    for sharding in ("ddp", "fsdp2"):
        for found in crew.run(work_on, tiny_policy, case, "float64", sharding):
            assert not isinstance(found, str), found
            same(found, alone)


@pytest.mark.parametrize("model", [{}, SEPARATE])
def test_tokens_that_prompts_share_change_nothing(tmp_path: Path, crew: Any, model: dict[str, Any]) -> None:
    """On a GPT-2: a Llama's norms round to float32, so that what is added up before them shows."""
    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)).save_pretrained(
        tmp_path
    )
    alike = [(23, 5), (4, 3), (21, 2), (25, 9), (21, 1), (22, 4), (3, 6)]  # most prompts have 20 tokens in common
    case = (alike, 60, model, {}, FULL | SMALL_STEPS)
    found = work_on(None, tmp_path, case, "float64", "ddp")
    with pytest.MonkeyPatch.context() as patch:
        num_rows = []
        for shortest in (SHORTEST_SHARED, 1000):
            for module in (packing, learner_batch):
                patch.setattr(module, "SHORTEST_SHARED", shortest)
            batch = ResponseBatch.from_table(make_table(len(alike), lengths=alike))
            arrays = batch.prompt_ids, batch.response_ids
            rows, _ = join_prompts(range(len(alike)), *arrays, hidden_size=32, narrowest=64, widest=60)
            num_rows.append(len(rows))
        apart = work_on(None, tmp_path, case, "float64", "ddp")
    assert num_rows[0] < num_rows[1] == len(alike)
    same(found, apart)
    for sharding in ("ddp", "fsdp2"):
        for of_rank in crew.run(work_on, tmp_path, case, "float64", sharding):
            assert not isinstance(of_rank, str), of_rank
            same(of_rank, apart)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_in_float32_ranks_differ_by_rounding_alone(tiny_policy: Path, crew: Any, sharding: str) -> None:
    case = ([(1 + row % 8, 1 + row % 11) for row in range(NUM_ROWS)], 40, {}, {}, SMALL_STEPS)
    alone = work_on(None, tiny_policy, case, "float32", "ddp")[0]
    for found in crew.run(work_on, tiny_policy, case, "float32", sharding):
        assert 0 < largest_difference(found[0], alone) < 1e-5


def work_on(
    ranks: Ranks | None, folder: Path, case: Case, dtype: str, sharding: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Make two updates as one of several ranks; returns weights and figures."""
    lengths, budget, model, learner, ppo = case
    learner = learner | {"sharding": sharding, "microbatch_tokens": budget}
    learner_rank = load_learner(folder, model | {"dtype": dtype}, learner, {"learning_rate": 1e-4} | ppo, ranks)
    table = make_table(len(lengths), lengths=lengths)
    learner_rank.update(table, 0)
    metrics = learner_rank.update(table, 1).metrics
    return weights(learner_rank), {name: value for name, value in metrics.items() if not name.startswith("time/")}
