import pickle
from pathlib import Path

import pytest
import torch

from ppo_ray.config import load_config
from ppo_ray.errors import InputError, WorkerLost
from ppo_ray.learner.publisher import WeightPublisher
from ppo_ray.weights import manifest
from ppo_ray.weights.snapshot import WeightSnapshot, Wire
from tests.learning import make_learner, publish


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_weights_that_the_learner_no_longer_has_are_lost_with_it(transport: str) -> None:
    """So the learner goes back to its checkpoint, as when it dies; the name comes through from its process."""
    options = ["output_dir=o", "model.path=m", "prompts.path=p", "reward.path=r"]
    sender = WeightPublisher(load_config(None, [*options, f"rollout.weight_transport={transport}"]), leads=True)
    with pytest.raises(WorkerLost, match="policy version 3 are asked for, but the learner has those of") as caught:
        sender.send(3) if transport == "nccl" else sender.export(3, 0)
    assert pickle.loads(pickle.dumps(caught.value)).name == "learner-0"


def test_memory_that_cannot_be_lent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["output_dir=o", "model.path=m", "prompts.path=p", "reward.path=r"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    WeightPublisher(load_config(None, options), leads=True)
    with pytest.raises(InputError, match="PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True.*object_store"):
        WeightPublisher(load_config(None, [*options, "rollout.weight_transport=ipc"]), leads=True)


def test_ranks_on_gpus_compare_sums_and_only_the_first_brings_its_weights_to_the_host(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(tiny_policy)
    options = ["output_dir=o", f"model.path={tiny_policy}", "prompts.path=p", "reward.path=r", "learner.workers=2"]
    options += ["learner.gpus=1", "rollout.weight_transport=object_store"]
    first, second = (WeightPublisher(load_config(None, options), leads) for leads in (True, False))
    _, buckets, agreed = publish(first, learner)
    assert buckets[0] is not None
    monkeypatch.setattr(manifest, "byte_checksum", lambda tensor: 1 // 0)  # which copies to the host
    found, others, also_agreed = publish(second, learner)
    assert (found.method, set(others), also_agreed) == ("sums", {None}, agreed)
    dict(learner.named_weights())["model.norm.weight"].data[3] += 1
    assert publish(second, learner)[2] != agreed


def test_all_buckets_are_in_the_memory_of_one(tiny_policy: Path) -> None:
    """Ray copies each into its store before it asks for the next: a learner holds no second copy of its weights."""
    learner = make_learner(tiny_policy)
    options = ["output_dir=o", f"model.path={tiny_policy}", "prompts.path=p", "reward.path=r"]
    publisher = WeightPublisher(load_config(None, options), leads=True)
    publisher._wire = Wire(None, 200_000)
    places = {bucket.__array_interface__["data"][0] for bucket in publisher.publish(learner) if bucket is not None}
    found, buckets, agreed = publish(publisher, learner)
    assert publisher.num_buckets(learner) == len(buckets) == 9 and len(places) <= 2  # the embedding is a larger one
    assert found == learner.weights(publisher.wire).manifest and agreed == found.checksum
    arrived = dict(WeightSnapshot(found, [bucket for bucket in buckets if bucket is not None]).tensors())
    for name, tensor in learner.named_weights():
        assert torch.equal(arrived.pop(name), tensor)
    assert not arrived
