"""The sending end of vLLM's weight-transfer API: NCCL broadcasts, and memory that is lent by CUDA IPC.

vLLM's trainer classes call the engines themselves, all with the same rank, and wait without a limit. Here the driver
calls the engines and the learner, watches all of them, and names the one that is late. So the sender's own calls do
nothing, and every engine is given ranks of its own. The group's id goes to the engines through Ray: no port is opened
for it.
"""

import base64
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from ppo_ray.errors import WorkerError
from ppo_ray.weights.manifest import TensorEntry, WeightManifest
from ppo_ray.weights.snapshot import NUM_BUFFERS

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_GPU = "cuda"


def new_group_id() -> str:
    """Return the id of a new NCCL group, base64; any process that has it may join."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId())).decode()


class NCCLSender:
    """Rank 0 of a NCCL group whose other ranks are engines."""

    def __init__(self) -> None:
        """Start outside any group."""
        self._sender: Any = None
        self._meeting: Future[Any] = Future()
        self._abandoned: str | None = None

    def join(self, group_id: str, world_size: int, buffer_bytes: int) -> None:
        """Join a group together with the engines; an earlier group is left.

        Args:
            group_id: of the new group.
            world_size: ranks of the group: this one and those of the engines.
            buffer_bytes: bytes per broadcast, as the engines are told.

        Raises:
            WorkerError: `leave` was called before all had come, or before this call.
        """
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        self.leave()
        sender = NCCLTrainerWeightTransferEngine(
            client=_DriverCalls(),
            source=None,
            packed=True,
            packed_buffer_size_bytes=buffer_bytes,
            packed_num_buffers=NUM_BUFFERS,
        )
        given = base64.b64decode(group_id), 0, world_size, torch.accelerator.current_device_index()
        self._meeting = meeting = Future[Any]()
        if group_id == self._abandoned:
            self.leave(group_id)
        threading.Thread(target=_meet, args=(meeting, lambda: uid_init_process_group(*given)), daemon=True).start()
        sender.model_update_group = meeting.result()
        self._sender = sender

    def send(self, manifest: WeightManifest, tensors: NamedTensors) -> None:
        """Broadcast tensors to all engines, which receive at the same time; returns when they are on their way.

        Args:
            manifest: of the tensors.
            tensors: may be made as they are asked for.
        """
        self._sender.source = _source(manifest, tensors)
        with _keep_stream():
            self._sender.send_weights()

    def leave(self, abandoned: str | None = None) -> None:
        """Leave the group, from any thread; a meeting or a broadcast that waits for a lost engine ends.

        Args:
            abandoned: id of a group that is not to be joined from now on.
        """
        self._abandoned = abandoned or self._abandoned
        with contextlib.suppress(InvalidStateError):
            self._meeting.set_exception(WorkerError("the meeting of the NCCL group was left: not all of it came"))
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()


def _meet(meeting: Future[Any], join: Callable[[], Any]) -> None:
    """Join a group in a thread of its own: NCCL waits there without a limit, and nobody can call it back.

    A thread that is left waits on for an engine that is gone; it holds nothing that another meeting needs.
    """
    try:
        group = join()
    except BaseException as error:  # whatever it is, whoever waits for the meeting raises it
        with contextlib.suppress(InvalidStateError):
            meeting.set_exception(error)
        return
    try:
        meeting.set_result(group)
    except InvalidStateError:
        group.destroy()  # they came when nobody waited any more


class LentBuffer:
    """Memory on this process's GPU that engines on the same GPU map.

    One buffer serves a whole sync: each export of memory is counted by torch until another process has mapped and
    released it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Allocate and export it."""
        device = torch.cuda.current_device()
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=_GPU)
        self.handle: dict[str, Any] = {gpu: reduce_tensor(self._buffer)[1]}
        """vLLM's arguments to map it, under the GPU's UUID."""

    def fill(self, placed: Iterable[tuple[TensorEntry, torch.Tensor]]) -> None:
        """Copy tensors to the places that their entries name; returns when they are there."""
        for entry, tensor in placed:
            view_tensor(self._buffer, entry).copy_(tensor.detach())
            del tensor  # before the next is made
        torch.cuda.synchronize()


def view_tensor(buffer: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Return a tensor that lies in a buffer of bytes, as a view."""
    raw = buffer[entry.offset : entry.end]
    return raw.view(getattr(torch, entry.dtype)).view(entry.shape)


@contextlib.contextmanager
def _keep_stream() -> Iterator[None]:
    """Restore this thread's CUDA stream at the end of a block.

    vLLM moves a thread that it is first used in to a stream of its own, but the learner's kernels must not depend on
    how its weights are sent.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        if stream is not None:
            torch.cuda.set_stream(stream)


class _DriverCalls:
    """A client for vLLM's sender whose calls do nothing: the driver has called the engines."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Do nothing."""

    def update_weights(self, update_info: Any) -> None:
        """Do nothing."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing."""


def _source(manifest: WeightManifest, tensors: NamedTensors) -> Any:
    """Return the tensors in the form that vLLM's sender reads."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(entry.name, getattr(torch, entry.dtype), entry.shape) for entry in manifest.entries]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(tensors)

    return Source()
