"""Learners of which every rank holds a share: what they save, send and look at is what a whole one would."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig, UpdateConfig
from ppo_ray.errors import NonFiniteError
from ppo_ray.learner.batch import ResponseBatch
from ppo_ray.learner.fsdp import group_by_node
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.masters import MasterWeights
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models.saving import find_parts
from tests.learning import largest_difference, load_learner, make_table, weights
from tests.rank_processes import rank_processes

PPO = {"epochs": 2, "minibatch_size": 4, "max_grad_norm": 0.1, "score_scaling": "mean_std"}
FLOAT64: dict[str, Any] = {"dtype": "float64", "critic": "shared"}


def learner_of(
    ranks: Ranks | None, folder: Path, model: dict[str, Any], checkpoint: Path | None = None, **options: Any
) -> PPOLearner:
    ppo = PPO | {"minibatch_size": options.pop("minibatch_size", 4)}
    options = {"sharding": "fsdp2", "microbatch_tokens": 40} | options
    return load_learner(folder, model, options, ppo, ranks, checkpoint)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file of a checkpoint, or its parts; each rank has written one."""
    return {name: tensor for part in find_parts(path) for name, tensor in load_file(part).items()}


def run(
    ranks: Ranks | None,
    folder: Path,
    model: dict[str, Any],
    steps: list[int],
    begin: Path | None,
    end: Path | None,
    minibatch_size: int = 4,
) -> dict[str, torch.Tensor]:
    """Make some steps, from a checkpoint and to another; returns the weights."""
    learner = learner_of(ranks, folder, model, begin, minibatch_size=minibatch_size)
    for step in steps:
        learner.update(make_table(7 + step), step)
    if end is not None:
        learner.save(end)
    return weights(learner)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_checkpoint_goes_on_with_other_ranks(tiny_policy: Path, crew: Any, tmp_path: Path, critic: str) -> None:
    model = FLOAT64 | {"critic": critic}
    shares, alone = tmp_path / "shares", tmp_path / "alone"
    crew.run(run, tiny_policy, model, [0], None, shares)
    through = run(None, tiny_policy, model, [0, 1], None, None)
    run(None, tiny_policy, model, [0], None, alone)

    names = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    for name in (name for name in names if name.suffix == ".safetensors"):
        assert largest_difference(read_tensors(shares / name), read_tensors(alone / name)) < 1e-10, name
    others = [name for name in names if name.suffix != ".safetensors"]
    assert all((shares / name).is_file() for name in others) and len(others) >= 5
    for name in (name for name in names if name.name == "config.json"):
        assert json.loads((shares / name).read_text()) == json.loads((alone / name).read_text())
    AutoModelForCausalLM.from_pretrained(shares)

    assert largest_difference(run(None, tiny_policy, model, [1], shares, None), through) < 1e-10
    for found in crew.run(run, tiny_policy, model, [1], alone, None):
        assert not isinstance(found, str), found
        assert largest_difference(found, through) < 1e-10


def shares_and_probe(ranks: Ranks | None, folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Return what a rank holds after an update, and what the weight probe finds."""
    learner = learner_of(ranks, folder, model)
    learner.update(make_table(9), 0)
    policy, reference = learner._policy, learner._reference
    parameters = [*policy.parameters(), *reference.parameters()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters]
    states = [state["exp_avg"] for state in learner._optimizer.state.values()]
    before = weights(learner)
    with learner.probe().move():
        moved = weights(learner)
    compared = learner.probe().compare(make_table(6))[0]
    return {
        "held": sum(tensor.numel() for tensor in local) / sum(tensor.numel() for tensor in parameters),
        "types": {tensor.dtype for tensor in policy.causal_lm.parameters()},
        "reference": {tensor.dtype for tensor in reference.parameters()},
        "moments": {(tensor.dtype, isinstance(tensor, DTensor)) for tensor in states},
        "before": before,
        "moved": moved,
        "unchanged": largest_difference(before, weights(learner)) == 0,
        "compared": [compared.to_moved, compared.to_own, compared.move],
    }


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_each_rank_holds_its_share_and_the_probe_moves_the_whole(tiny_policy: Path, crew: Any, dtype: str) -> None:
    model = FLOAT64 | {"dtype": dtype}
    exact = torch.promote_types(getattr(torch, dtype), torch.float32)
    tolerance, alone = {"float64": 1e-9, "bfloat16": 0.05}[dtype], shares_and_probe(None, tiny_policy, model)
    size = len(crew.processes)
    answers = crew.run(shares_and_probe, tiny_policy, model)
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert sum(answer["held"] for answer in answers) == pytest.approx(1)
    for answer in answers:
        assert answer["held"] == pytest.approx(1 / size, abs=0.02)
        assert (answer["types"], answer["reference"]) == ({exact}, {getattr(torch, dtype)})
        assert answer["moments"] == {(exact, True)}
        assert {tensor.dtype for tensor in answer["before"].values()} == {getattr(torch, dtype)}
        assert answer["unchanged"]
        assert largest_difference(answer["moved"], alone["moved"]) < tolerance
        assert answer["compared"] == pytest.approx(alone["compared"], abs=tolerance)
        assert answer["compared"][2] > 0.01


def test_groups_of_ranks_are_of_one_node_where_they_can_be() -> None:
    assert group_by_node(["a"] * 4, 2) == [[0, 1], [2, 3]]
    assert group_by_node(["a", "b", "a", "b"], 2) == [[0, 2], [1, 3]]  # as colocated engines lie
    assert group_by_node([*"aaab", *"bbbb"], 4) == [[0, 1, 2, 7], [3, 4, 5, 6]]  # three and five: one group is split
    assert group_by_node([*"abcabc"], 3) == [[0, 1, 3], [2, 4, 5]]  # larger than a node: whole nodes as far as it goes
    for size in (1, 2, 3, 6):
        groups = group_by_node([*"ccabca"], size)
        assert sorted(rank for group in groups for rank in group) == list(range(6))
        assert all(group == sorted(group) for group in groups)


NODES = ("a", "b", "a", "b")
BY_TWO = {"shard_size": 2, "microbatch_tokens": 16, "minibatch_size": 8}  # two passes for a rank


def run_in_groups(
    ranks: Ranks, folder: Path, model: dict[str, Any], steps: list[int], begin: Path | None, end: Path | None
) -> Any:
    """As `run`, of ranks on two nodes; returns also what this rank holds, and how often each reduction was made."""
    learner = learner_of(replace(ranks, nodes=NODES), folder, model, begin, **BY_TWO)
    parameters = [*learner._policy.parameters(), *learner._reference.parameters()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters]
    held = sum(tensor.numel() for tensor in local) / sum(tensor.numel() for tensor in parameters)
    with (
        mock.patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single) as within,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as between,
    ):
        for step in steps:
            learner.update(make_table(7 + step), step)
    counts = within.call_count, sum("group" in call.kwargs for call in between.call_args_list)
    if end is not None:
        learner.save(end)
    with learner.probe().move():
        moved = weights(learner)
    return weights(learner), moved, held, counts


def test_groups_of_ranks_make_the_update_of_one_and_its_checkpoint(
    tiny_policy: Path, crew: Any, tmp_path: Path
) -> None:
    """Two groups of two, each with a copy of the models; from there to three ranks, to one, and back."""
    models = {"shared": FLOAT64, "both": FLOAT64 | {"critic": "separate", "lora": LoraConfig(rank=4)}}
    with rank_processes(4) as four:
        for name, model in models.items():
            groups, alone = tmp_path / f"{name}-groups", tmp_path / f"{name}-alone"
            found = four.run(run_in_groups, tiny_policy, model, [0], None, groups)
            wanted = run(None, tiny_policy, model, [0], None, alone, 8)
            assert all(isinstance(answer, tuple) for answer in found), found
            for answer in found:
                assert largest_difference(answer[0], wanted) < 1e-10
                assert largest_difference(answer[0], found[0][0]) == largest_difference(answer[1], found[0][1]) == 0
                assert largest_difference(answer[0], answer[1]) > 0.001
                assert answer[2] == pytest.approx(0.5, abs=0.01)
            for file in alone.rglob("*.safetensors"):
                path = groups / file.relative_to(alone)
                assert largest_difference(read_tensors(path), read_tensors(file)) < 1e-10, path
                assert sum(len(load_file(part)) for part in find_parts(path)) == len(read_tensors(file))
            through = run(None, tiny_policy, model, [1], alone, None, 8)
            later = [run(None, tiny_policy, model, [1], groups, None, 8)]
            later += crew.run(run, tiny_policy, model, [1], groups, None, 8)
            later += [answer[0] for answer in four.run(run_in_groups, tiny_policy, model, [1], alone, None)]
            for one in later:
                assert not isinstance(one, str), one
                assert largest_difference(one, through) < 1e-10
        within, between = found[0][3]
        assert {answer[3] for answer in found} == {(within, between)}
        assert 1 < between < within and within % between == 0  # once per mini-batch between groups, however many passes


def note_gradients(ranks: Ranks, folder: Path, options: dict[str, Any]) -> Any:
    """Make an update; returns the weights, the first gradient's norm, and the types and sizes of what is summed."""
    learner = load_learner(folder, {}, {"microbatch_tokens": 16} | options, {"epochs": 2}, ranks)
    summed, all_reduce, reduce_scatter = set(), dist.all_reduce, dist.reduce_scatter_single

    def note_sum(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        summed.add((tensor.dtype, tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    def note_scatter(*args: Any, **kwargs: Any) -> Any:
        summed.update((part.dtype, part.numel()) for part in kwargs.values() if isinstance(part, torch.Tensor))
        return reduce_scatter(*args, **kwargs)

    with (
        mock.patch.object(dist, "all_reduce", note_sum),
        mock.patch.object(dist, "reduce_scatter_single", note_scatter),
    ):
        report = learner.update(make_table(12), 0)
    return weights(learner), report.minibatches[0].grad_norm, summed


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_gradients_travel_in_bfloat16_if_they_are_told_to(tiny_policy: Path, crew: Any, sharding: str) -> None:
    """The value head's do not; and the ranks have the same sums, bit for bit."""
    exact = crew.run(note_gradients, tiny_policy, {"sharding": sharding})
    rounded = crew.run(note_gradients, tiny_policy, {"sharding": sharding, "reduce_dtype": "bfloat16"})
    assert all(isinstance(answer, tuple) for answer in (*exact, *rounded)), (exact, rounded)
    for answers, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        assert {answer[1] for answer in answers} == {answers[0][1]}
        for answer in answers:
            assert largest_difference(answer[0], answers[0][0]) == 0
            assert {kind for kind, size in answer[2] if size > 10_000} == {dtype}
            head = 129 if sharding == "ddp" else 129 * 3
            assert {kind for kind, size in answer[2] if size == head} == {torch.float32}
    assert 0 < abs(rounded[0][1] / exact[0][1] - 1) < 0.01
    assert 0 < largest_difference(rounded[0][0], exact[0][0]) < 0.005  # two steps of 1e-3


def count_reductions(ranks: Ranks, folder: Path, when: str) -> tuple[int, int]:
    """Return how often gradients are reduced in two epochs of one mini-batch, and the passes of each."""
    options = {"sharding": "fsdp2", "microbatch_tokens": 16, "reduce_gradients": when}
    learner = load_learner(folder, {}, options, {"epochs": 2}, ranks)
    with mock.patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single) as reduce:
        learner.update(make_table(12), 0)
    return reduce.call_count, learner._layout.num_passes(ResponseBatch.from_table(make_table(12)))


def test_gradients_are_reduced_once_per_pass_or_per_mini_batch(tiny_policy: Path, crew: Any) -> None:
    """Those of two layers, of the embeddings and of the value head each at a time."""
    ((once, num_passes),) = set(crew.run(count_reductions, tiny_policy, "minibatch"))
    ((each, _),) = set(crew.run(count_reductions, tiny_policy, "microbatch"))
    assert (once, each) == (4 * 2, 4 * 2 * num_passes) and num_passes > 1


def not_finite(ranks: Ranks, folder: Path) -> str:
    learner = load_learner(folder, {}, {"sharding": "fsdp2", "microbatch_tokens": 40}, {}, ranks)
    before = weights(learner)
    with contextlib.suppress(NonFiniteError):
        learner.update(make_table(4, [3e38, -3e38, 3e38, -3e38]), 0)
        return "nothing was said"
    return "as before" if largest_difference(before, weights(learner)) == 0 else "changed"


def test_all_ranks_refuse_what_is_not_finite(tiny_policy: Path, crew: Any) -> None:
    assert set(crew.run(not_finite, tiny_policy)) == {"as before"}


def add_up(ranks: Ranks) -> None:
    ranks.sum([torch.ones(1)])


def die_at_work(ranks: Ranks, folder: Path) -> None:
    """Let the last rank die in the backward pass of a layer, whose gradients the others wait for."""
    learner = load_learner(folder, {}, {"sharding": "fsdp2"}, {}, ranks)
    if ranks.rank == 1:
        learner._policy.causal_lm.model.layers[1].mlp.register_full_backward_hook(lambda *unused: os._exit(9))
    learner.update(make_table(6), 0)


def test_the_loss_of_a_rank_at_work_is_told_from_other_errors(tiny_policy: Path) -> None:
    with rank_processes(2) as processes:
        (first, second), (later, _) = processes.run(die_at_work, tiny_policy), processes.run(add_up)
    assert first.startswith("PeersLost: rank 0 lost touch with another rank"), first
    assert second == "gone"
    assert later.startswith("PeersLost: rank 0 lost touch with another rank"), later


OPTIONS = UpdateConfig(learning_rate=1e-6, epochs=2)


def load(folder: Path, critic: str = "shared", checkpoint: Path | None = None) -> PPOLearner:
    model = ModelConfig(path=str(folder), dtype="bfloat16", critic=critic)
    return PPOLearner.load(model, OPTIONS, LearnerConfig(), temperature=1.0, device="cpu", checkpoint=checkpoint)


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
