"""What the transports of weights wait for on a GPU, on streams that run late and in any order.

Each wait is taken away too: the weights that arrive are then others, in at least one of the orders that are tried.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppo_ray.weights import nccl_sender
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import NUM_BUFFERS, Wire
from tests.late_streams import LateGPU, Stream

pytestmark = pytest.mark.slow  # they import vLLM

BUCKET = 600
WIRE = Wire("bfloat16", BUCKET)
ORDERS = [(seed, haste) for seed in range(4) for haste in (0.0, 0.2, 0.6)]
Removed = Callable[[pytest.MonkeyPatch], None]


class Weights:
    """A policy's weights, which an update changes on the learner's stream."""

    def __init__(self) -> None:
        self.tensors = {f"layer.{index}": torch.full((8 + index, 16), float(index)) for index in range(6)}
        self.wanted = {name: (tensor + 1).bfloat16() for name, tensor in self.tensors.items()}

    def update(self) -> None:
        for tensor in self.tensors.values():
            tensor.add_(1)

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from WIRE.round(self.tensors.items())

    def are(self, found: dict[str, torch.Tensor]) -> bool:
        same = found.keys() == self.wanted.keys()
        return same and all(torch.equal(found[name], tensor) for name, tensor in self.wanted.items())


def publish(weights: Weights) -> WeightManifest:
    """Update the weights, and describe them, as `WeightPublisher.publish` does."""
    weights.update()
    return WeightManifest.of(weights.named(), 1, "sums", BUCKET)


class Group:
    """A NCCL communicator of two: a broadcast is work of the current stream on either side."""

    def __init__(self, gpu: LateGPU, rank: int, sent: list[torch.Tensor]) -> None:
        self._gpu, self._rank, self._sent, self._number = gpu, rank, sent, 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        number, self._number = self._number, self._number + 1

        def send() -> None:
            self._sent.append(tensor.clone())

        def receive() -> None:
            for sender in self._gpu.streams:  # NCCL waits for the other side
                while sender.process == "learner" and sender.work and len(self._sent) <= number:
                    sender.do_next()
            tensor.copy_(self._sent[number])

        self._gpu.enqueue(receive if self._rank else send)

    def destroy(self) -> None: ...


def broadcast(gpu: LateGPU, patch: pytest.MonkeyPatch) -> bool:
    """Send weights by NCCL and update them again; says whether the engine has those that were published."""
    import vllm.distributed.weight_transfer.packed_tensor as packed
    from vllm.distributed.weight_transfer import nccl_common
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    weights, sent, loaded = Weights(), [], {}  # type: ignore[var-annotated]
    patch.setattr(nccl_common, "uid_init_process_group", lambda *_: Group(gpu, 0, sent))
    patch.setattr(packed, "_get_streams", lambda device, count: [gpu.stream() for _ in range(count)])
    send = NCCLTrainerWeightTransferEngine.send_weights

    def send_elsewhere(engine: Any) -> None:
        send(engine)
        torch.cuda.set_stream(gpu.stream())  # as vLLM does where it is used for the first time

    patch.setattr(NCCLTrainerWeightTransferEngine, "send_weights", send_elsewhere)
    sender = nccl_sender.NCCLSender()
    with gpu:
        sender.join("", 2, BUCKET)
        sender.send(publish(weights), weights.named())
        assert gpu.current is gpu.streams[0]  # the learner's own, whatever vLLM has changed
        weights.update()  # the next step's
        engine = gpu.stream("engine")
        with gpu.on(engine):
            packed.packed_nccl_broadcast_consumer(
                iter([(name, (tensor.shape, tensor.dtype)) for name, tensor in weights.wanted.items()]),
                Group(gpu, 1, sent),
                0,
                lambda tensors: loaded.update({name: tensor.clone() for name, tensor in tensors}),
                BUCKET,
                NUM_BUFFERS,
                "cpu",
            )
            served = {name: tensor.clone() for name, tensor in loaded.items()}  # as the next forward pass reads them
            engine.synchronize()
    return weights.are(served)


def lend(gpu: LateGPU, patch: pytest.MonkeyPatch) -> bool:
    """Lend weights bucket by bucket, as `IPCTransport` asks for it; says whether the engine has them."""
    from ppo_ray.rollout.vllm_receiver import IPC, LentBucket

    weights, loaded = Weights(), {}  # type: ignore[var-annotated]
    patch.setattr(nccl_sender, "_GPU", "cpu")
    patch.setattr(nccl_sender, "reduce_tensor", lambda buffer: (None, (buffer, *range(6))))
    engine = SimpleNamespace(
        device=torch.device("cuda", 0),
        _importer=SimpleNamespace(rebuild=lambda arguments: arguments[0]),
        model=SimpleNamespace(
            load_weights=lambda tensors: loaded.update({name: tensor.clone() for name, tensor in tensors})
        ),
    )
    receive = IPC.__mro__[2].receive_weights
    with gpu:
        stream, rest = gpu.stream("engine"), weights.named()
        manifest = publish(weights)
        buckets = [entries for _, entries in manifest.buckets()]
        assert len(buckets) > 2
        lent = nccl_sender.LentBuffer(max(entries[-1].end for entries in buckets))
        for entries in buckets:
            lent.fill((entry, next(rest)[1]) for entry in entries)
            with gpu.on(stream):
                receive(engine, LentBucket(lent.handle, list(entries)))
        weights.update()
        stream.synchronize()
    return weights.are(loaded)


def run(transport: Callable[..., bool], removed: Removed | None = None) -> list[bool]:
    """Send weights once in each order, without a wait; says of each whether they arrived."""
    arrived = []
    for seed, haste in ORDERS:
        with pytest.MonkeyPatch.context() as patch:
            gpu = LateGPU(seed, haste)
            gpu.patch(patch)
            if removed:
                removed(patch)
            arrived.append(transport(gpu, patch))
    return arrived


@pytest.mark.parametrize("transport", [broadcast, lend])
def test_weights_arrive_in_whatever_order_the_streams_run(transport: Callable[..., bool]) -> None:
    assert all(run(transport))


def sums_that_nobody_waits_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "tolist", lambda tensor: [[1, 1]] * len(tensor))


def streams_that_are_not_drained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "synchronize", lambda stream: None)


def no_wait_in(process: str) -> Removed:
    def remove(patch: pytest.MonkeyPatch) -> None:
        whole = torch.cuda.synchronize

        def synchronize(device: Any = None) -> None:
            if torch.cuda.current_stream().process != process:  # type: ignore[attr-defined]
                whole(device)

        patch.setattr(torch.cuda, "synchronize", synchronize)

    return remove


@pytest.mark.parametrize(
    ("transport", "removed"),
    [
        (broadcast, sums_that_nobody_waits_for),
        (broadcast, streams_that_are_not_drained),
        (lend, no_wait_in("learner")),
        (lend, no_wait_in("engine")),
    ],
)
def test_a_wait_that_is_missing_shows(transport: Callable[..., bool], removed: Removed) -> None:
    assert not all(run(transport, removed))
