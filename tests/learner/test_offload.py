"""What lies in host memory between its phases: gone from the device meanwhile, and then what it was, bit for bit.

On a machine without a GPU the device is the CPU: tensors leave it for other memory of the host, and come back.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ppo_ray.config import LoraConfig
from ppo_ray.learner import learner as learner_module
from ppo_ray.learner import offload
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.minibatch import MinibatchUpdater
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.ranks import Ranks
from ppo_ray.weights.snapshot import Buffers
from tests.learning import largest_difference, load_learner, make_table, weights

BOTH = {"offload": ("optimizer", "reference"), "microbatch_tokens": 30}
PPO = {"epochs": 2, "minibatch_size": 4, "max_grad_norm": 0.1}


def test_what_is_put_away_takes_no_memory_and_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over pieces of 16 bytes; a view and a tied tensor share a storage, which is there once."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", 16)
    tensors = [torch.arange(7.0), torch.tensor([True, False, True]), torch.empty(0), torch.randn(3, 5).bfloat16()]
    tensors += [tensors[0][2:5], tensors[3].T, torch.tensor(2.5)]
    before, addresses = [tensor.clone() for tensor in tensors], [id(tensor) for tensor in tensors]
    parts = Offload(["optimizer"])
    parts.manage("optimizer", lambda: tensors)
    parts.put_away("optimizer", tensors[3])
    parts.put_away("optimizer")
    parts.put_away("optimizer")  # all of it is away
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 7
    assert all(parts.holds(tensor) == bool(tensor.numel()) for tensor in tensors)
    assert [len(part.chunks) for part in parts._parts.values()] == [-(-(28 + 3 + 30 + 4) // 16)]
    with parts.lend(tensors[4]) as lent:
        assert torch.equal(lent, before[4])
        lent += 1  # which is not kept
    with parts.lend(tensors[5], changes=True) as lent:
        lent[0, 0] = 7
    before[3][0, 0] = before[5][0, 0] = 7
    assert tensors[0].untyped_storage().nbytes() == tensors[5].untyped_storage().nbytes() == 0
    parts.fetch("optimizer")
    parts.fetch("optimizer")
    for tensor, wanted, address in zip(tensors, before, addresses, strict=True):
        assert torch.equal(tensor, wanted) and id(tensor) == address and not parts.holds(tensor)
    parts.put_away("reference", tensors[0])  # was not chosen
    with parts.lend(tensors[0]) as lent:
        assert torch.equal(lent, before[0])
    parts.put_away("optimizer")
    assert [len(part.chunks) for part in parts._parts.values()] == [5]  # the same memory again


def bytes_of(learner: PPOLearner, name: str) -> int:
    return sum(size for _, _, size in learner._offload._parts[name].away.values())


def work(
    ranks: Ranks | None, folder: Path, model: dict[str, Any], options: dict[str, Any], end: Path, begin: Path | None
) -> tuple[dict[str, torch.Tensor], dict[str, float], Any]:
    """Make two updates, and save; returns weights, figures, and what is away when something computes."""
    learner = load_learner(folder, model, options, PPO, ranks, begin)
    away = []

    def watch(function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            away.append(sorted(name for name in learner._offload._parts if bytes_of(learner, name)))
            return function(*args, **kwargs)

        return watched

    runs, epochs = learner_module.run_models, MinibatchUpdater.run_epochs
    with mock.patch.object(learner_module, "run_models", watch(runs)):
        with mock.patch.object(MinibatchUpdater, "run_epochs", watch(epochs)):
            learner.update(make_table(9), 0)
            metrics = learner.update(make_table(9), 1).metrics
        metrics["measured"] = learner.measure_kl(make_table(5))
    learner.take_snapshot(Buffers()).write(end)
    learner.save(end.with_name(f"{end.name}-again"))  # without a copy of what is in host memory already
    metrics = {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}
    sizes = {name: bytes_of(learner, name) for name in learner._offload._parts}
    return weights(learner), metrics, (away, sizes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["masters", "float32", "adapters"])
def test_an_update_and_a_checkpoint_are_the_same_bit_for_bit(tiny_policy: Path, tmp_path: Path, kind: str) -> None:
    """Also after a checkpoint that one without it has written."""
    given: dict[str, dict[str, Any]] = {
        "masters": {"dtype": "bfloat16", "critic": "separate", "reference_path": str(tiny_policy)},
        "float32": {},
        "adapters": {"dtype": "bfloat16", "lora": LoraConfig(rank=4)},
    }
    model, chosen = given[kind], ("optimizer",) if kind == "adapters" else BOTH["offload"]
    options = BOTH | {"offload": chosen}
    begin = None
    for round_ in ("first", "second"):
        plain, other = tmp_path / f"plain-{round_}", tmp_path / f"other-{round_}"
        wanted = work(None, tiny_policy, model, BOTH | {"offload": ()}, plain, begin)
        found = work(None, tiny_policy, model, options, other, begin)
        assert largest_difference(found[0], wanted[0]) == 0 and found[1] == wanted[1]
        assert files(other) == files(plain) == files(tmp_path / f"{other.name}-again")
        begin = plain
    num_weights = sum(tensor.numel() for tensor in wanted[0].values())
    away, sizes = found[2]
    if kind == "adapters":
        assert away == [["optimizer"], []] * 2 + [["optimizer"]] and 0 < sizes["optimizer"] < num_weights
        return
    assert away == [["optimizer"], ["reference"]] * 2 + [["optimizer"]]
    assert sizes["reference"] == (2 if kind == "masters" else 4) * num_weights
    head, critic = 129, num_weights if kind == "masters" else 0
    assert sizes["optimizer"] == (12 if critic else 8) * (num_weights + critic) + 8 * head


def work_with_and_without(ranks: Ranks, folder: Path, model: dict[str, Any], options: dict[str, Any], end: Path) -> Any:
    shape = options | {"microbatch_tokens": 30}
    wanted = work(ranks, folder, model, shape, end / "plain", None)
    found = work(ranks, folder, model, shape | BOTH, end / "other", None)
    again = work(ranks, folder, model, shape | BOTH, end / "again", end / "plain")
    through = work(ranks, folder, model, shape, end / "through", end / "plain")
    differences = [largest_difference(found[0], wanted[0]), largest_difference(again[0], through[0])]
    return differences, found[1] == wanted[1] and again[1] == through[1], found[2]


def test_ranks_do_so_with_their_shards(tiny_policy: Path, crew: Any, tmp_path: Path) -> None:
    """By three, which divide few tensors, so that the reference's shards get other memory in the first pass."""
    model = {"dtype": "bfloat16", "reference_path": str(tiny_policy)}
    answers = crew.run(work_with_and_without, tiny_policy, model, {"sharding": "fsdp2"}, tmp_path)
    for answer in answers:
        assert not isinstance(answer, str), answer
        assert answer[0] == [0, 0] and answer[1]
        assert answer[2][0] == [["optimizer"], ["reference"]] * 2 + [["optimizer"]]
    for end in ("plain", "through"):
        assert files(tmp_path / end) == files(tmp_path / {"plain": "other", "through": "again"}[end])
