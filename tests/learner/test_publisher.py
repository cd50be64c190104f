import pickle

import pytest

from ppo_ray.config import load_config
from ppo_ray.errors import InputError, WorkerLost
from ppo_ray.learner.publisher import WeightPublisher


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
