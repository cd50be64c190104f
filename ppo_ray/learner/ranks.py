"""The processes that share an update: their rendezvous, their process group, and reductions over them."""

import contextlib
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from ppo_ray.errors import PeersLost, WorkerError
from ppo_ray.plan.demand import actor_name

_POLL_S = 0.05
_IN_FLIGHT = 4  # reductions at a time: what they need beside the tensors is four buckets
_BUCKET_BYTES = 25 << 20  # as torch's DistributedDataParallel: large enough to hide the latency of a collective


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of ranks.

    With more than one, torch's default process group must be up, and all ranks make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    texts: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Of `share`: on the host, and apart from the other calls."""
    nodes: tuple[str, ...] = ()
    """The node of each rank; empty: all are on one."""
    limit: timedelta | None = field(default=None, repr=False, compare=False)
    """Longest wait in a collective; None: torch's own."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which does what is done once for all ranks."""
        return self.rank == 0

    def sum(self, tensors: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> None:
        """Replace each tensor by its sum over all ranks, in place.

        Args:
            tensors: the same on all ranks, but for their values.
            dtype: that they travel in, and are added up in; None: their own.

        Raises:
            PeersLost: another rank is gone.
        """
        self._reduce(tensors, dist.ReduceOp.SUM, dtype)

    def max(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its maximum over all ranks, in place; raises as `sum`."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def share(self, text: str) -> list[str]:
        """Return every rank's text, in the order of the ranks, once all have called this: from one thread at a time.

        The thread may be another than that of the other calls.

        Raises:
            PeersLost: another rank is gone.
        """
        if self.size == 1:
            return [text]
        raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths, longest = torch.zeros(self.size, dtype=torch.int64), torch.tensor([len(raw)])
        with detect_lost_peers(self.rank):
            dist.all_gather(list(lengths.split(1)), longest.clone(), group=self.texts)
            padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            padded[: len(raw)] = raw
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded, group=self.texts)
        return [bytes(one[:length].numpy()).decode() for one, length in zip(found, lengths.tolist(), strict=True)]

    def _reduce(
        self, tensors: Iterable[torch.Tensor], operation: dist.ReduceOp.RedOpType, dtype: torch.dtype | None = None
    ) -> None:
        if self.size == 1:
            return
        pending: deque[tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = deque()
        with detect_lost_peers(self.rank):
            for bucket in _buckets(tensors):
                if len(pending) == _IN_FLIGHT:
                    _finish(*pending.popleft())
                flat = bucket[0] if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])
                flat = flat.to(dtype or flat.dtype)
                pending.append((bucket, flat, dist.all_reduce(flat, operation, async_op=True)))
            for reduction in pending:
                _finish(*reduction)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield runs of tensors of one dtype and device, of at most `_BUCKET_BYTES` or of one tensor: few collectives."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _finish(bucket: list[torch.Tensor], flat: torch.Tensor, work: dist.Work) -> None:
    """Wait for a bucket's reduction, and copy it back into its tensors, if it was not made in place."""
    work.wait()
    if flat is not bucket[0]:
        for tensor, part in zip(bucket, flat.reshape(-1).split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def detect_lost_peers(rank: int) -> Iterator[None]:
    """Raise the loss of another rank, a bare RuntimeError in torch, as an error of its own.

    Raises:
        PeersLost: torch's communication failed.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo has no kind of its own; it names its file
            raise PeersLost(f"rank {rank} lost touch with another rank: {error}") from error
        raise


@dataclass(frozen=True)
class Rendezvous:
    """The place where all ranks meet."""

    host: str
    """IP address of the node of rank 0; loopback where all are on one node."""
    port: int
    prefix: str
    """Of the keys of this meeting, drawn anew for each and known by Ray alone: who comes to the port by mistake, as a
    rank of a meeting before may, is none of these ranks. No lock: torch's store lists its keys to whoever asks."""
    nodes: tuple[str, ...] = ()
    """The node of each rank, by any name; empty: all are on one."""


def open_rendezvous(host: str, timeout_s: float) -> tuple[Rendezvous, dist.TCPStore]:
    """Open the rendezvous on rank 0; it listens on `host` alone, on a free port.

    Args:
        host: an IP address of this machine.
        timeout_s: longest wait for a key, seconds.

    Returns:
        The place, and the store, which must be kept alive as long as the ranks work together.
    """
    listener = socket.create_server((host, 0), family=_family(host))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return Rendezvous(host, port, secrets.token_hex(16)), store


def join(rendezvous: Rendezvous, rank: int, size: int, backend: str, timeout_s: float, call_timeout_s: float) -> Ranks:
    """Join the other ranks in torch's default process group.

    Args:
        rendezvous: of all ranks.
        rank: of this process, 0 to `size - 1`.
        size: how many.
        backend: `"gloo"` or `"nccl"`.
        timeout_s: longest wait for all to come, seconds.
        call_timeout_s: longest wait in a collective, seconds.

    Raises:
        WorkerError: not all came in time; names those that are missing.
        PeersLost: one came and was lost again.
    """
    # NCCL looks for an interface by itself: the same process meets engines on other nodes, which loopback cannot reach
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(rendezvous.host))
    with detect_lost_peers(rank):
        timeout = timedelta(seconds=timeout_s)
        everything = dist.TCPStore(rendezvous.host, rendezvous.port, timeout=timeout, wait_for_workers=False)
        store = dist.PrefixStore(rendezvous.prefix, everything)
        _wait_for_all(store, rank, size, timeout_s)
        limit = timedelta(seconds=call_timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        texts = dist.new_group(backend="gloo", timeout=limit)
    return Ranks(rank, size, texts, rendezvous.nodes, limit)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_for_all(store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
    """Announce this rank and wait for the others; torch's own wait does not name those that are missing."""
    store.set(f"here/{rank}", "")
    deadline = time.monotonic() + timeout_s
    while missing := [other for other in range(size) if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            names = ", ".join(actor_name("learner", other) for other in missing)
            raise WorkerError(f"{names} did not join the other ranks within {timeout_s:g} s (ray.start_timeout_s)")
        time.sleep(_POLL_S)


def _interface(host: str) -> str:
    """Return the network interface that has the route to the rendezvous; the ranks use it.

    Raises:
        WorkerError: no interface has it.
    """
    try:
        with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            mine = probe.getsockname()[0]
    except OSError as error:
        raise WorkerError(f"this machine has no route to {host}, where the learner's ranks meet: {error}") from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == mine for address in addresses):  # fe80::1%eth0
            return name
    raise WorkerError(
        f"this machine's own address on the way to {host}, where the learner's ranks meet, is {mine}, which is on none "
        "of its network interfaces"
    )


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
