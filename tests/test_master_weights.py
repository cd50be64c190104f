"""A policy in bfloat16 learns what is smaller than bfloat16 can hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_ray.config import LearnerConfig, ModelConfig, PPOConfig
from ppo_ray.learner import PPOLearner
from ppo_ray.master_weights import MasterWeights
from tests.learning import largest_difference, make_table, weights

OPTIONS = PPOConfig(learning_rate=1e-6, epochs=2)


def load(folder: Path, critic: str = "shared", checkpoint: Path | None = None) -> PPOLearner:
    model = ModelConfig(path=str(folder), dtype="bfloat16", critic=critic)
    return PPOLearner.load(model, OPTIONS, LearnerConfig(), device="cpu", checkpoint=checkpoint)


def test_small_steps_add_up_where_rounding_would_lose_each() -> None:
    """Fifty steps of 1e-4 from 1: bfloat16 is 0.0078 apart there, so that each alone is rounded away."""
    with_masters, without = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    masters = MasterWeights([with_masters])
    without.data = without.data.bfloat16()
    stepped = masters.of(with_masters)
    for parameter, optimized in ((with_masters, stepped), (without, without)):
        optimizer = torch.optim.SGD([optimized], lr=1e-4)
        for _ in range(50):
            parameter.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            masters.write_back()
    assert without.tolist() == [1.0] * 3
    assert stepped.tolist() == pytest.approx([0.995] * 3, abs=1e-6)
    assert with_masters.dtype == torch.bfloat16
    assert with_masters.tolist() == [0.99609375] * 3  # the nearest there is


def test_gradients_of_micro_batches_are_added_up_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    parameter = torch.nn.Parameter(torch.ones(1))
    masters = MasterWeights([parameter])
    for factor in (256.0, 1.0, 1.0):
        (parameter * factor).sum().backward()
    assert parameter.grad is None
    gradient = masters.of(parameter).grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert gradient.tolist() == [258.0]


def test_an_update_moves_the_masters_and_sends_their_rounding(tiny_policy: Path, tmp_path: Path) -> None:
    learner = load(tiny_policy)
    before = weights(learner)
    metrics = learner.update(make_table(), 0).metrics
    assert metrics["kl/per_sequence"] == 0
    assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-6)
    learner.save(tmp_path)
    masters = load_file(tmp_path / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32  # as they lie there
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).named_parameters())
    moved = {name: (tensor - start[name].detach()).abs() for name, tensor in masters.items()}
    assert all(1.0e-6 < float(change.max()) < 2.5e-6 for change in moved.values())  # two steps of 1e-6
    after = weights(learner)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in masters.items())
    changed = sum(int((after[name] != before[name]).sum()) for name in after) / sum(map(torch.numel, after.values()))
    assert changed < 0.1  # without masters nothing else would have been learnt


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_what_is_saved_goes_on_bit_for_bit(tiny_policy: Path, tmp_path: Path, critic: str) -> None:
    through = load(tiny_policy, critic)
    through.update(make_table(8), 0)
    through.save(tmp_path / "one")
    again = load(tiny_policy, critic, tmp_path / "one")
    for learner in (through, again):
        learner.update(make_table(7), 1)
        learner.save(tmp_path / ("through" if learner is through else "again"))
    for name in ("model.safetensors", "learner/optimizer.safetensors", "learner/state.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "through" / name).read_bytes(), name
    assert largest_difference(weights(through), weights(again)) == 0
