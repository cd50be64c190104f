"""NCCL and CUDA IPC without a GPU: vLLM's own sender and receiver, our own check, and a group that is a queue.

What is not run here is NCCL and CUDA themselves: `Group` broadcasts within the process, `Mapping` hands tensors over.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_ray.config import Config, Transport, load_config
from ppo_ray.errors import WorkerError, WorkerLost
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.publisher import WeightPublisher
from ppo_ray.models.adapter_files import read_adapter_shapes
from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, ENVIRONMENT, VLLMEngine
from ppo_ray.weights.nccl_sender import NCCLSender, new_group_id
from ppo_ray.weights.snapshot import Wire
from ppo_ray.weights.transports import engine_init
from tests.learner.test_lora import load as load_adapted
from tests.learning import make_learner, publish
from tests.rollout.comparison import REQUESTS, largest_difference, reference, start_beside_others
from tests.rollout.test_engines import SAMPLED

pytestmark = pytest.mark.slow

GROUP_ID, OTHER_ID = "A" * 171 + "=", "B" * 170 + "A="  # 128 bytes


class Group:
    """What stands for a NCCL communicator; one that is aborted fails whoever waits in it."""

    met: dict[int, "Group"]

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.aborted = rank, world_size, False
        self.arriving: queue.Queue[torch.Tensor] = queue.Queue()
        self.met[rank] = self

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0
        if self.rank == 0:
            for other in range(1, self.world_size):
                self.met[other].arriving.put(tensor.clone())
            return
        arrived = self.arriving.get(timeout=60)
        assert arrived.shape == tensor.shape, "sender and receiver cut the stream differently"
        tensor.copy_(arrived)

    def destroy(self) -> None:
        self.aborted = True


class Stream:
    def synchronize(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> Iterator[pytest.MonkeyPatch]:
    os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT)
    import vllm.distributed.weight_transfer.packed_tensor as packed
    from vllm.distributed.weight_transfer import nccl_common

    Group.met = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_common, "uid_init_process_group", lambda uid, rank, size, device: Group(rank, size))
        patch.setattr(packed, "_get_streams", lambda device, count: [Stream()] * count)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        yield patch


def start_engine(folder: Path, transport: Transport, **options: Any) -> VLLMEngine:
    return start_beside_others(folder, transport=transport, **options)


@pytest.fixture(scope="module")
def engine(tiny_policy: Path, no_gpu: pytest.MonkeyPatch) -> VLLMEngine:
    return start_engine(tiny_policy, "nccl")


@pytest.fixture
def learner(tiny_policy: Path) -> PPOLearner:
    return make_learner(tiny_policy)


def config_of(folder: Path, *options: str) -> Config:
    given = [f"model.path={folder}", "output_dir=out", "prompts.path=p", "reward.function=a:b"]
    return load_config(None, [*given, "rollout.weight_bucket_mib=1", *options])


def moved(learner: PPOLearner, tiny_policy: Path, noise: float) -> torch.nn.Module:
    model = reference(tiny_policy, noise)
    with torch.no_grad():
        for (_, mine), theirs in zip(learner.named_weights(), model.parameters(), strict=True):
            mine.copy_(theirs)
    return model


def test_an_id_is_the_whole_of_ncclGetUniqueId(monkeypatch: pytest.MonkeyPatch) -> None:
    import base64

    from vllm.distributed.device_communicators import pynccl_wrapper

    class Library:
        def ncclGetUniqueId(self) -> Any:
            return pynccl_wrapper.ncclUniqueId.from_buffer_copy(bytes(range(128, 256)))

    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", Library)
    assert base64.b64decode(new_group_id()) == bytes(range(128, 256))


@pytest.mark.parametrize("wire", ["null", "bfloat16"])
def test_a_broadcast_is_served(engine: VLLMEngine, learner: PPOLearner, tiny_policy: Path, wire: str) -> None:
    """One of two engines; the other is a group alone. Small buffers, so that there are some."""
    config = config_of(tiny_policy, "rollout.weight_transport=nccl", f"rollout.wire_dtype={wire}")
    sender = WeightPublisher(config, leads=True)
    sender.abort("")  # nothing to abort yet
    for version in (1, 2):
        model = moved(learner, tiny_policy, 0.05 * version)
        learner.policy_version = version
        manifest, buckets, agreed = publish(sender, learner)
        assert buckets == [] and agreed == manifest.checksum and manifest.method == "sums"
        assert {entry.dtype for entry in manifest.entries} == {"float32" if wire == "null" else wire}
        sender._wire = Wire(sender.wire.dtype, 300_000)
        Group.met.clear()
        sender.join(GROUP_ID, 3)
        engine.connect(engine_init(GROUP_ID, 2, 3, 300_000))
        assert {rank: group.world_size for rank, group in Group.met.items()} == {0: 3, 2: 3}
        Group(1, 3)
        thread = threading.Thread(target=sender.send, args=(version,))
        thread.start()
        engine.receive_weights(manifest)
        thread.join()
        assert engine.policy_version == version
        tolerance = 1e-4 if wire == "null" else 0.1
        completions = engine.generate(REQUESTS, SAMPLED)
        assert largest_difference(model, completions) < tolerance
        if wire == "null":
            assert largest_difference(reference(tiny_policy), completions) > 0.1
    old = Group.met[0]
    sender.abort(GROUP_ID)
    assert old.aborted
    with pytest.raises(WorkerLost, match="policy version 1 are asked for, but the learner has those of version 2"):
        sender.send(1)


def test_a_meeting_that_an_engine_does_not_come_to_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner is free at once, and meets the others anew; whoever comes late finds nobody."""
    from vllm.distributed.weight_transfer import nccl_common

    came, late = threading.Event(), Group(0, 2)

    def wait(*given: Any) -> Group:
        assert came.wait(60)
        return late

    sender, raised = NCCLSender(), []
    before = sender._meeting

    def join() -> None:
        try:
            sender.join(GROUP_ID, 2, 1 << 20)
        except WorkerError as error:
            raised.append(str(error))

    monkeypatch.setattr(nccl_common, "uid_init_process_group", wait)
    thread = threading.Thread(target=join)
    thread.start()
    while sender._meeting is before:
        time.sleep(0.01)
    sender.leave(GROUP_ID)
    thread.join(60)
    join()  # or the driver gave it up before the learner began
    assert raised == ["the meeting of the NCCL group was left: not all of it came"] * 2
    monkeypatch.setattr(nccl_common, "uid_init_process_group", lambda uid, rank, size, device: Group(rank, size))
    sender.join(OTHER_ID, 2, 1 << 20)
    assert sender._sender.model_update_group is Group.met[0]
    came.set()
    while not late.aborted:
        time.sleep(0.01)
    assert not Group.met[0].aborted
    monkeypatch.setattr(nccl_common, "uid_init_process_group", lambda *given: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        sender.join(OTHER_ID, 2, 1 << 20)


def test_a_broadcast_of_adapters_alone(tiny_policy: Path) -> None:
    """Buffers are so small that each is filled again and again: what arrives in one must not be kept there."""
    lora = ("model.lora.rank=4", "rollout.adapter_sync=adapter")
    config = config_of(tiny_policy, "rollout.weight_transport=nccl", *lora)
    engine = start_engine(tiny_policy, "nccl", adapters=read_adapter_shapes(config.model))
    learner, sender = load_adapted(tiny_policy), WeightPublisher(config, leads=True)
    sender._wire = Wire(None, 20_000)
    Group.met.clear()
    sender.join(GROUP_ID, 2)
    engine.connect(engine_init(GROUP_ID, 1, 2, 20_000))
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in learner._policy.causal_lm.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.2)
        learner.policy_version = version
        manifest, _, _ = publish(sender, learner)
        assert len(manifest.entries) == 2 * 7 * 2
        thread = threading.Thread(target=sender.send, args=(version,))
        thread.start()
        engine.receive_weights(manifest)
        thread.join()
        assert engine.policy_version == version
        completions = engine.generate(REQUESTS, SAMPLED)
        assert largest_difference(learner._policy.causal_lm, completions) < 1e-4
        assert largest_difference(reference(tiny_policy), completions) > 0.5


def test_cuda_ipc(learner: PPOLearner, tiny_policy: Path, no_gpu: pytest.MonkeyPatch) -> None:
    """Two learner ranks on two GPUs; the engine maps what is on its own. The one buffer is filled again and again."""
    from torch.multiprocessing import reductions

    from ppo_ray.weights import nccl_sender

    class Properties:
        uuid = "GPU-b"

    memory: dict[int, torch.Tensor] = {}
    lent, mapped = [], []

    def lend(tensor: torch.Tensor) -> tuple[None, tuple[Any, ...]]:
        memory[tensor.data_ptr()] = tensor
        lent.append(tensor.nbytes)
        return None, (*("torch.Tensor", tensor.data_ptr(), 0, 0, 0, 0), 7)  # the seventh is the sender's device

    def map_again(kind: str, place: int, *rest: int) -> torch.Tensor:
        assert rest[-1] is None  # the engine's own device, which is not the sender's
        mapped.append(place)
        return memory[place]

    no_gpu.setattr(nccl_sender, "reduce_tensor", lend)
    no_gpu.setattr(nccl_sender, "_GPU", "cpu")
    no_gpu.setattr(reductions, "rebuild_cuda_tensor", map_again)
    no_gpu.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    no_gpu.setattr(torch.cuda, "current_device", lambda: 7)
    no_gpu.setattr(torch.cuda, "synchronize", lambda device=None: None)
    engine = start_engine(tiny_policy, "ipc")
    sender = WeightPublisher(config_of(tiny_policy, "rollout.weight_transport=ipc"), leads=True)
    sender._wire = Wire(None, 300_000)
    for version in (4, 5):
        model = moved(learner, tiny_policy, 0.05 * version)
        learner.policy_version = version
        manifest, _, _ = publish(sender, learner)
        bucket, num_buckets = 0, 1
        while bucket < num_buckets:
            num_buckets, handle = sender.export(version, bucket)
            engine.map_weights(manifest, bucket, {"GPU-a": (), **handle})
            bucket += 1
        sender.release()
        assert num_buckets > 3 and len(lent) == len(mapped) == version - 3  # once per sync
        assert max(lent) <= 300_000
        assert engine.policy_version == version
        assert largest_difference(model, engine.generate(REQUESTS, SAMPLED)) < 1e-4
    with pytest.raises(WorkerError, match="no learner rank has lent its weights on GPU GPU-b, but on \\['GPU-a'\\]"):
        engine.map_weights(manifest, 0, {"GPU-a": ()})


def test_a_stale_tensor_is_found_and_the_engine_is_lost(
    engine: VLLMEngine, learner: PPOLearner, tiny_policy: Path
) -> None:
    """Last: nothing can be done with the engine afterwards."""
    sender = WeightPublisher(config_of(tiny_policy, "rollout.weight_transport=nccl"), leads=True)
    learner.policy_version = 9
    manifest, _, _ = publish(sender, learner)
    sender.join(GROUP_ID, 2)
    engine.connect(engine_init(GROUP_ID, 1, 2, 1 << 20))
    dict(learner.named_weights())["model.layers.1.mlp.up_proj.weight"].data[3, 5] *= 1.001
    thread = threading.Thread(target=sender.send, args=(9,))
    thread.start()
    with pytest.raises(WorkerError, match=r"version 9 arrived damaged: model.layers.1.mlp.up_proj.weight \(checksum"):
        engine.receive_weights(manifest)
    thread.join()
    assert engine.policy_version == -1
    for use in (lambda: engine.generate(REQUESTS, SAMPLED), lambda: engine.load_weights(learner.weights())):
        with pytest.raises(WorkerLost, match="its layers are of two policies"):
            use()
