"""A learner's state on its way to the disk: each rank has a part of it in host memory, and writes that part.

Every tensor has one owner among the ranks, so that all copy, hash and write about as many bytes, and nobody holds the
whole. Of a learner on a GPU the parts are copies, and it may go on: what is written is the state as it was. A learner
on a CPU has its state in host memory already. A copy would be as large as all that it trains, so it waits instead.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.tensor import DTensor, Shard

from ppo_ray.checkpoint import FileSums
from ppo_ray.learner.fsdp import gather_full, shard_group
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.ranks import Ranks, detect_lost_peers
from ppo_ray.learner.sharding import Sharding
from ppo_ray.learner.state import LearnerState
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.packing import balance
from ppo_ray.models.quantization import named_tensors
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.saving import State, TensorFile, WrittenFile, name_part, write_index, write_tensors
from ppo_ray.weights.checksums import byte_checksum, weights_checksum
from ppo_ray.weights.manifest import BucketCursor
from ppo_ray.weights.snapshot import Buffers

_LAYER = re.compile(r".*?\.\d+(?=\.)")
_BUFFER_BYTES = 1 << 30  # a power of two: torch rounds memory that a GPU writes to up to one


@dataclass(frozen=True)
class _OwnFile:
    """The tensors of a file, or of one of its parts, that this rank writes."""

    file: TensorFile
    path: Path
    tensors: State


@dataclass(frozen=True)
class LearnerSnapshot:
    """A learner's whole state between two updates, in the host memory of its ranks; each has a part."""

    ranks: Ranks
    own: tuple[_OwnFile, ...]
    state: LearnerState
    """Without the checksum of the weights."""
    weights: State
    """The policy's weights that this rank owns, by their names in the policy."""
    frozen: dict[str, str]
    """Checksums of the policy's weights that are not trained, and so not written."""
    plain_files: dict[str, bytes]
    """What a checkpoint holds beside tensors and scalars, by path; the first rank writes it."""

    @classmethod
    def take(
        cls,
        files: Sequence[TensorFile],
        state: LearnerState,
        checksums: "StateChecksums",
        plain_files: dict[str, bytes],
        ranks: Ranks,
        buffers: Buffers | None,
    ) -> Self:
        """Take the tensors that this rank owns; all ranks call this together.

        Args:
            files: of the checkpoint, with the tensors as this rank holds them; the policy's is the first.
            state: the scalars.
            checksums: of the same models.
            plain_files: as the field.
            ranks: the processes that share the update.
            buffers: memory for copies; the next snapshot that is taken into them overwrites this one. None: what this
                rank holds whole in host memory is not copied, and must not change until it is written.

        Raises:
            PeersLost: another rank is gone.
        """
        owners = _deal_out(files, ranks.size)
        tensors = {id(tensor): tensor for file in files for tensor in file.tensors.values()}
        mine = [key for key in tensors if owners[key] == ranks.rank]
        rooms = [] if buffers is None else _make_room([tensors[key] for key in mine], buffers)
        copies = dict(zip(mine, rooms, strict=False))
        with torch.no_grad():
            for key, tensor in tensors.items():
                with checksums.offload.lend(tensor):
                    whole = _gather_to(owners[key], tensor)
                    if key in copies:
                        copies[key].copy_(whole, non_blocking=True)
                    elif owners[key] == ranks.rank:
                        copies[key] = whole.to("cpu", copy=checksums.offload.holds(tensor)).contiguous()
                    del whole  # before the next is made
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        own = []
        for file in files:
            writers = sorted({owners[id(tensor)] for tensor in file.tensors.values()})
            if ranks.rank in writers or (not writers and ranks.leads):
                here = {name: copies[id(tensor)] for name, tensor in file.tensors.items() if id(tensor) in copies}
                number = writers.index(ranks.rank) if writers else 0
                own.append(_OwnFile(file, name_part(file.path, number + 1, max(len(writers), 1)), here))
        policy = {name: id(tensor) for name, tensor in files[0].tensors.items() if name in checksums.names}
        weights = {name: copies[key] for name, key in policy.items() if key in copies}
        return cls(ranks, tuple(own), state, weights, checksums.frozen, plain_files)

    def write(self, folder: Path) -> FileSums:
        """Write what this rank owns; all ranks call this, each from any thread, and it ends when all have written.

        Args:
            folder: which all ranks see, for `from_pretrained` afterwards; made if it is not there.

        Returns:
            Size and checksum of each safetensors file, those of the other ranks too.

        Raises:
            OSError: a rank could not write; none of them writes any longer.
            PeersLost: another rank is gone.
        """
        report: dict[str, Any] = {"folder": str(folder), "failure": None, "files": []}
        failure: Exception | None = None
        try:
            for own in self.own:
                written = write_tensors(folder / own.path, own.file.rename(own.tensors))
                report["files"].append((str(own.file.path), str(own.path), asdict(written)))
            report["weights"] = {name: byte_checksum(tensor) for name, tensor in self.weights.items()}
        except Exception as error:  # whatever it is, the other ranks wait for the report
            failure, report["failure"] = error, f"{type(error).__name__}: {error}"
        reports = [json.loads(text) for text in self.ranks.share(json.dumps(report))]
        if failure is not None:
            raise failure
        for rank, other in enumerate(reports):
            if other["failure"] or other["folder"] != str(folder):
                raise OSError(f"rank {rank}, writing into {other['folder']}: {other['failure'] or 'another folder'}")
        files = [(whole, path, WrittenFile(**file)) for one in reports for whole, path, file in one["files"]]
        if self.ranks.leads:
            self._write_rest(folder, files, {name: sum for one in reports for name, sum in one["weights"].items()})
        return {path: (file.size, file.checksum) for _, path, file in files}

    def _write_rest(self, folder: Path, files: list[tuple[str, str, WrittenFile]], weights: dict[str, str]) -> None:
        """Write indices, configs, tokenizer and scalars."""
        for whole in {whole for whole, path, _ in files if path != whole}:
            write_index(folder / whole, {Path(path).name: file for other, path, file in files if other == whole})
        for name, content in self.plain_files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        replace(self.state, weights_checksum=_combine(self.frozen | weights)).write(folder)


class StateChecksums:
    """The checksums of policy and reference: of those of each tensor, which is hashed by its owner alone."""

    def __init__(self, policy: ActorCritic, reference: ResponseLM, sharding: Sharding, offload: Offload) -> None:
        """Take models as they lie on the ranks; all ranks call the methods and properties together.

        Args:
            policy: the one that is trained.
            reference: frozen.
            sharding: of the policy.
            offload: what of the learner's state may lie in host memory.
        """
        self._policy, self._reference, self._sharding, self.offload = policy, reference, sharding, offload

    @property
    def names(self) -> frozenset[str]:
        """The names of the policy's weights, and of the codes of quantised ones; a tied one has its first."""
        return frozenset(name for name, _ in named_tensors(self._policy.causal_lm))

    @cached_property
    def reference(self) -> str:
        """The checksum of the reference, which never changes."""
        return _combine(self._hash(dict(self._reference.named_weights())))

    @cached_property
    def frozen(self) -> dict[str, str]:
        """The checksums of the weights that are not trained; with adapters all others are that."""
        named, trained = dict(named_tensors(self._policy.causal_lm)), self._trained
        return self._hash({name: tensor for name, tensor in named.items() if name not in trained})

    def has_reference(self, state: LearnerState) -> bool:
        """Say whether the reference is that of a checkpoint's state."""
        if state.by_tensor:
            return self.reference == state.reference_checksum

        def gather() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self._reference.named_weights():
                with self.offload.lend(tensor):
                    yield name, gather_full(tensor).to("cpu", copy=self.offload.holds(tensor))

        return weights_checksum(gather()) == state.reference_checksum

    def has_weights(self, state: LearnerState) -> bool:
        """Say whether the policy's weights are those of a checkpoint's state."""
        if state.by_tensor:
            found = self.frozen | self._hash(self._trained)
            return _combine(found) == state.weights_checksum
        return weights_checksum(self._sharding.parameters()) == state.weights_checksum

    @property
    def _trained(self) -> State:
        """The policy's weights that are trained, as this rank holds them."""
        state, names = self._sharding.state(), self.names
        named = ((name.removeprefix("causal_lm."), tensor) for name, tensor in state.items())
        return {name: tensor for name, tensor in named if name in names}

    def _hash(self, tensors: State) -> dict[str, str]:
        """Return the checksum of each tensor's bytes by its name; each is gathered to one rank, which hashes it."""
        ranks, found = self._sharding.ranks, dict[str, str]()
        owners = _deal_out([TensorFile(Path(), tensors)], ranks.size)
        for name, tensor in tensors.items():
            with self.offload.lend(tensor):
                whole = _gather_to(owners[id(tensor)], tensor)
                if owners[id(tensor)] == ranks.rank:
                    found[name] = byte_checksum(whole.to("cpu", copy=self.offload.holds(tensor)))
                del whole  # before the next is made
        return {name: sum for text in ranks.share(json.dumps(found)) for name, sum in json.loads(text).items()}


def _deal_out(files: Sequence[TensorFile], num_ranks: int) -> dict[int, int]:
    """Return the rank that owns each tensor, by its id: the largest unit first, to the rank that has least so far.

    A unit is a file that has no parts, or what a file has of a layer: some tensors of transformers' files are made of
    several of a layer's. Tensors that are tied go together too.
    """
    units: dict[int, tuple[Path, str]] = {}
    sizes: dict[tuple[Path, str], int] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            layer = _LAYER.match(name)
            unit = file.path, (layer[0] if layer else name) if file.has_parts else ""
            if id(tensor) not in units:
                units[id(tensor)] = unit
                sizes[unit] = sizes.get(unit, 0) + tensor.numel() * tensor.element_size()
    names, shares = list(sizes), balance(list(sizes.values()), num_ranks)
    owners = {names[index]: rank for rank, share in enumerate(shares) for index in share}
    return {key: owners[unit] for key, unit in units.items()}


def _make_room(tensors: Sequence[torch.Tensor], buffers: Buffers) -> Iterator[torch.Tensor]:
    """Yield an empty tensor on the host for each tensor, in its shape and type, in memory that is reused."""
    cursor, ends = BucketCursor(_BUFFER_BYTES), dict[int, int]()
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    places = [cursor.place(size) for size in sizes]
    for (bucket, offset), size in zip(places, sizes, strict=True):
        ends[bucket] = offset + size
    pinned = any(tensor.is_cuda for tensor in tensors)
    rooms = [buffers.get(bucket, end, pinned) for bucket, end in ends.items()]
    for tensor, (bucket, offset), size in zip(tensors, places, sizes, strict=True):
        flat = torch.from_numpy(rooms[bucket][offset : offset + size])  # a storage of its own: no two tensors are tied
        yield flat.view(tensor.dtype).view(tensor.shape)


def _gather_to(owner: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return a full tensor without gradient on one rank; all ranks call this, and those of its shard group gather it.

    On the other ranks it is whatever is there. Shards are of the first dimension, in the order of the ranks, all as
    long as the first but for those at the end.

    Raises:
        PeersLost: another rank is gone.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    assert tensor.placements[-1] == Shard(0)
    local, (group, members) = tensor.to_local().detach(), shard_group(tensor.device_mesh)
    if owner not in members:
        return local
    size = len(members)
    longest = -(-tensor.shape[0] // size)
    shard = local.new_zeros((longest, *tensor.shape[1:]))
    shard[: local.shape[0]] = local
    whole = local.new_empty((size, *shard.shape)) if dist.get_rank() == owner else None
    with detect_lost_peers(dist.get_rank()):
        raw = None if whole is None else list(whole.view(size, -1).view(torch.uint8))  # gloo does not know all dtypes
        dist.gather(shard.view(-1).view(torch.uint8), raw, dst=owner, group=group)
    return local if whole is None else whole.flatten(0, 1)[: tensor.shape[0]]


def _combine(checksums: dict[str, str]) -> str:
    """Return XXH3-64 of named checksums, in the order of the names, hexadecimal."""
    return str(xxhash.xxh3_64_hexdigest(json.dumps(sorted(checksums.items())).encode()))
