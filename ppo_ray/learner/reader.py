"""Models on their way from files to the ranks: whole onto each rank, or read by the first rank and shared out by it.

A large model fits into the memory of all ranks together, and into the host memory of one node hardly more than once.
So under `fsdp2` the first rank alone reads it, tensor after tensor goes from there to the ranks' shards, and nothing
else of it remains. The other ranks build the same model on the meta device, which needs no memory.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ppo_ray.config import Quantization, Trust
from ppo_ray.errors import InputError, PPORayError, WorkerError
from ppo_ray.learner.fsdp import find_places, shard_group
from ppo_ray.learner.ranks import Ranks, detect_lost_peers
from ppo_ray.models.loading import load_empty, load_pretrained
from ppo_ray.models.tensors import list_names

T = TypeVar("T")


class Reader:
    """Reads models whole, onto this rank's device."""

    def __init__(self, device: torch.device) -> None:
        """Keep where the models go."""
        self.device = device

    def read(
        self, auto_class: Any, path: str, dtype: str, trust: Trust, quantization: Quantization | None = None
    ) -> Any:
        """Read a model by one of transformers' Auto classes; arguments and errors as `load_pretrained`."""
        how: Any = {"dtype": dtype, "device": self.device, "quantization": quantization}
        return load_pretrained(auto_class, path, trust=trust, **how)

    def find(self, work: Callable[[], T]) -> T:
        """Return what is found out by computing with models that were read."""
        return work()

    def agree(self, work: Callable[[], T]) -> T:
        """Do a piece of work that every rank does."""
        return work()

    def share_out(self, model: torch.nn.Module, take: Callable[[torch.Tensor], None] | None = None) -> None:
        """Do nothing: this rank keeps the model whole, where it was read to."""


class FirstReader(Reader):
    """Reads models on the first rank alone, and shares them out; all ranks make the same calls in the same order.

    An error on any rank is raised on all ranks: the first rank's, if it has one.
    """

    def __init__(self, ranks: Ranks, device: torch.device, mesh: DeviceMesh) -> None:
        """Keep where the shards go.

        Args:
            ranks: the processes that share each model.
            device: this rank's, for its shards.
            mesh: that the ranks make; see `make_mesh`.
        """
        super().__init__(device)
        self.ranks, self._mesh = ranks, mesh
        self.shards: dict[torch.nn.Parameter, torch.Tensor] = {}
        """This rank's shard of each parameter that was shared out: some of its rows, as FSDP cuts it. The parameter
        itself is on the meta device."""

    def read(
        self, auto_class: Any, path: str, dtype: str, trust: Trust, quantization: Quantization | None = None
    ) -> Any:
        """Read a model into the first rank's host memory; the other ranks get it on the meta device.

        Raises:
            InputError: as `load_pretrained`.
        """
        assert quantization is None, "the config refuses codes that would have to be shared out"

        def work() -> Any:
            if self.ranks.leads:
                return load_pretrained(auto_class, path, dtype=dtype, device="cpu", trust=trust)
            return load_empty(auto_class, path, dtype=dtype, trust=trust)

        return self.agree(work)

    def find(self, work: Callable[[], T]) -> T:
        """Return what the first rank finds, on all ranks."""
        found = [self.agree(lambda: work() if self.ranks.leads else None)]
        with detect_lost_peers(self.ranks.rank):
            dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def agree(self, work: Callable[[], T]) -> T:
        """Do a piece of work on every rank, and go on if none has failed.

        Raises:
            PPORayError: that of the first rank that has failed; an error of another kind is a `WorkerError` elsewhere.
        """
        done: list[T] = []
        error: Exception | None = None
        try:
            done.append(work())
        except Exception as raised:  # an error of any kind would leave the other ranks waiting
            error = raised
        errors: list[Exception | None] = [None] * self.ranks.size
        with detect_lost_peers(self.ranks.rank):
            dist.all_gather_object(errors, _make_portable(error))
        if error is not None and not any(errors[: self.ranks.rank]):
            raise error
        if first := next(filter(None, errors), None):
            raise first
        return done[0]

    @torch.no_grad()
    def share_out(self, model: torch.nn.Module, take: Callable[[torch.Tensor], None] | None = None) -> None:
        """Move a model from the first rank to the ranks' shards; its parameters are on the meta device then.

        The first rank's memory is freed tensor by tensor. Buffers, which are small, every rank gets whole. What was
        shared out before stays as it is.

        Args:
            model: on the first rank; on the meta device elsewhere.
            take: is given each shard as soon as this rank has it.

        Raises:
            InputError: a rank has built another model than the first.
        """
        self._check_alike(model)
        places: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
        for module, name, parameter in find_places(model):
            if parameter not in self.shards:
                places.setdefault(parameter, []).append((module, name))
        del parameter  # which holds the last one's memory
        with detect_lost_peers(self.ranks.rank):
            while places:
                parameter, owners = places.popitem()
                empty = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                self.shards[empty] = shard = self._scatter(parameter)
                if take is not None:
                    take(shard)
                for module, name in owners:
                    setattr(module, name, empty)
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                    ours = torch.empty_like(buffer, device=self.device)
                    module._buffers[name] = ours.copy_(buffer) if self.ranks.leads else ours
                    dist.broadcast(ours, src=0)

    def _scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of the first rank's tensor: as many for each rank, but for the last ones.

        Where there are several shard groups, the first rank's shares it out, and its ranks pass on what they got.
        """
        group, members = shard_group(self._mesh)
        size, index = len(members), members.index(self.ranks.rank)
        num_rows = -(-len(tensor) // size)
        shard = torch.empty(num_rows, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        shards = None
        if self.ranks.leads:
            whole = tensor.detach().to(self.device).contiguous()
            if missing := num_rows * size - len(whole):
                whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
            shards = list(whole.split(num_rows))
        if 0 in members:
            dist.scatter(shard, shards, src=0, group=group)
        if self._mesh.ndim == 2:
            dist.broadcast(shard, src=int(self._mesh.mesh[0, index]), group=self._mesh.get_group(0))
        return shard[: max(0, len(tensor) - index * num_rows)]

    def _check_alike(self, model: torch.nn.Module) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        ours = [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors]
        first = self.find(lambda: ours)

        def compare() -> None:
            if ours != first:
                differing = list_names(set(ours) ^ set(first)) if set(ours) != set(first) else "their order"
                raise InputError(
                    f"on learner rank {self.ranks.rank}'s node a model's files or the packages are others than on the "
                    f"first rank's: the models that they make differ in {differing}; give all nodes the same"
                )

        self.agree(compare)


def _make_portable(error: Exception | None) -> Exception | None:
    """Return an error as one that can be sent to other processes: those of libraries often cannot."""
    return error if error is None or isinstance(error, PPORayError) else WorkerError(f"{type(error).__name__}: {error}")
