"""The learner's memory on a GPU, traced without one: its real code runs on fake tensors, which have shapes and no data.

torch's FakeTensorMode computes shapes alone, so a policy of 32 billion parameters needs neither memory nor time. A
storage counts from the operation that returns it until nobody holds it, as in CUDA's allocator. Attention is replaced
by the kernel that a GPU would take, with its mask. What a kernel allocates inside itself is not seen, nor what the
allocator loses between blocks. The tensors are said to be on the CPU: a torch that is built for CPUs has no autograd
for another device.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # the shapes of collectives, for fake tensors
import transformers
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_ray.config import Config
from ppo_ray.learner import experience, offload
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.sharding import FullySharded, Replicated, Sharding
from ppo_ray.models import attention, token_logprobs
from ppo_ray.models.actor_critic import ActorCritic, CausalLMWithCritic, CausalLMWithValueHead
from ppo_ray.models.decoder import Decoder, recompute_layers
from ppo_ray.models.loading import cast
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.token_logprobs import count_rows
from tests.learning import make_table

_BLOCK = 512
"""CUDA's allocator gives whole blocks of this many bytes."""
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64, torch.bool: np.bool_}


class Tracker(TorchDispatchMode):
    """Follows the lifetimes of all storages; no value is known: numbers are 1 or 2, all is true, and nothing wrong."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.live = self.peak = self.at_rest = 0
        """Bytes: now, at most, and when the update was over."""
        self.at_peak: Counter[str] = Counter()
        """Bytes by the operation that made them and their type and shape."""
        self._by_label: Counter[str] = Counter()
        self._sizes: dict[int, tuple[int, str, Any]] = {}
        self._mode: Any = None

    def __enter__(self) -> "Tracker":
        """Follow what happens in the block, and storages whose size is changed."""
        self._mode, self._resize = active_fake_mode(), torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> None:
            self._resize(storage, size)
            if id(storage) in self._sizes:
                self._count(storage, self._sizes[id(storage)][1])

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End it."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.live, self._by_label.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it returns."""
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it comes again, with the local shards
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            _, label, _ = self._sizes.get(id(args[0].untyped_storage()), (0, "", None))
            return {torch.bool: not label.startswith("aten::any"), torch.int64: 2}.get(args[0].dtype, 1.0)
        if func in (aten.allclose.default, aten.equal.default):
            return True
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # its shape function would return a copy
        if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            (index,) = args[1]  # as many as there are: which is as many as there can be
            found = args[0].new_empty(index.numel(), *args[0].shape[index.ndim :])
        else:
            found = func(*args, **kwargs or {})
        if active_fake_mode() is self._mode:  # else DTensor asks for a shape
            for leaf in tree_leaves(found):
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                    label = f"{func.name()} {str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
                    self._count(leaf.untyped_storage(), label)
        return found

    def _count(self, storage: Any, label: str) -> None:
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        before, label, reference = self._sizes.get(id(storage), (0, label, None))
        if size == before:
            return
        reference = reference or weakref.ref(storage, partial(self._forget, id(storage)))
        self._sizes[id(storage)] = size, label, reference
        self._add(size - before, label)

    def _forget(self, key: int, _: Any) -> None:
        size, label, _ = self._sizes.pop(key)
        self._add(-size, label)

    def _add(self, size: int, label: str) -> None:
        self.live += size
        self._by_label[label] += size
        if self.live > self.peak:
            self.restart()


def _read_by(read: Callable[[torch.Tensor], Any], turn: Callable[[Any], Any]) -> Callable[[torch.Tensor], Any]:
    """Return `numpy` or `tolist` for tensors with values, and zeros for those that have none."""

    def values(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, FakeTensor):
            return turn(np.zeros(tuple(tensor.shape), _NUMPY[tensor.dtype]))
        return read(tensor)

    return values


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attend as CUDA does: with a mask the memory-efficient kernel, whose mask is of the queries' type; else flash.

    See `scaled_dot_product_attention` in torch's aten/src/ATen/native/transformers/attention.cpp: a mask of bools is
    made one of -inf, and padded to whole blocks of 8.
    """
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    assert attn_mask.dtype == torch.bool and not enable_gqa
    added = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    width = added.shape[-1]
    if width % 8:
        added = torch.nn.functional.pad(added, (0, -width % 8))[..., :width]
    added = added.expand(*query.shape[:2], *added.shape[2:])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    needs_gradient = any(tensor.requires_grad for tensor in (query, key, value))
    return efficient(query, key, value, added, needs_gradient, scale=scale)[0]


@contextlib.contextmanager
def on_fake_gpu() -> Iterator[Tracker]:
    """Compute with fake tensors as on a GPU, and follow their memory."""
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (Decoder, "_pick_tokens", lambda decoder, number: np.arange(1, number + 1)),
            (token_logprobs, "_keeps_float32", lambda hidden: hidden.dtype == torch.bfloat16),
            (token_logprobs, "count_rows", lambda _, num_entries: count_rows(torch.device("cuda"), num_entries)),
            (torch.nn.functional, "scaled_dot_product_attention", _attend),
            (attention, "_takes_flash", lambda query, *_: query.dtype == torch.bfloat16),
            (
                experience,
                "gae",
                lambda rewards, *_: (torch.empty_like(rewards), torch.empty_like(rewards)),
            ),  # it is slow
            (torch.nn.Linear, "to", lambda linear, *_: linear),  # a value head, which is there already
            (offload._Part, "pieces", lambda *_: iter(())),  # what is put away has no values
            (torch.Tensor, "numpy", _read_by(torch.Tensor.numpy, lambda zeros: zeros)),
            (torch.Tensor, "tolist", _read_by(torch.Tensor.tolist, np.ndarray.tolist)),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Tracker())


def trace_update(config: Config, shapes: Mapping[str, Any], lengths: tuple[int, int]) -> Tracker:
    """Trace the first rank of a learner through a mini-batch of two passes, with all gradients and moments; returns it.

    Args:
        config: of the run; its models are not read.
        shapes: `policy` and, where it is separate, `critic`: configs of transformers, as they are in `config.json`.
        lengths: tokens of each prompt and response.
    """
    size = config.learner.workers if config.learner.sharding == "fsdp2" else 1
    with contextlib.ExitStack() as stack:
        if size > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
            stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("cpu", (size,)) if size > 1 else None  # whose ranks are values
        tracker = stack.enter_context(on_fake_gpu())
        learner = _make_learner(config, shapes, Ranks(0, size), mesh)
        first = config.ppo.value_warmup_steps
        learner.update(make_table(size, lengths=[(2, 2)] * size), first)  # the optimizer has its moments after it
        tracker.restart()
        rows = 2 * size * max(1, config.learner.microbatch_tokens // (sum(lengths) - 1))
        learner.update(make_table(rows, lengths=[lengths] * rows), first + 1)
        tracker.at_rest = tracker.live
        return tracker


def _make_learner(config: Config, shapes: Mapping[str, Any], ranks: Ranks, mesh: DeviceMesh | None) -> PPOLearner:
    """Make a learner as `load_models` and `PPOLearner.load` do, of weights that have no values."""
    dtype = getattr(torch, config.model.dtype)
    policy: ActorCritic
    if config.model.critic == "separate":
        critic = _build(transformers.AutoModel, shapes["critic"])
        policy = CausalLMWithCritic(
            _build(transformers.AutoModelForCausalLM, shapes["policy"]), critic, temperature=1.0
        )
    else:
        policy = CausalLMWithValueHead(_build(transformers.AutoModelForCausalLM, shapes["policy"]), temperature=1.0)
    reference = ResponseLM(_build(transformers.AutoModelForCausalLM, shapes["policy"]), temperature=1.0)
    reference.requires_grad_(False)
    for parameter in reference.parameters():
        cast(parameter, dtype)
    if config.learner.gradient_checkpointing:
        recompute_layers(policy)
    layout: Sharding
    away = Offload(config.learner.offload)
    if mesh is not None:
        layout = FullySharded(policy, reference, ranks, dtype, mesh, {})
    else:
        layout = Replicated(policy, ranks, dtype, offload=away)
    away.manage("reference", reference.parameters)
    away.put_away("reference")
    ppo = config.ppo.model_copy(update={"minibatch_size": None, "epochs": 1})
    tokens = config.learner.microbatch_tokens
    how: Any = {"microbatch_tokens": tokens, "num_steps": 1000, "sharding": layout, "offload": away}
    return PPOLearner(policy, reference, ppo, **how)


def _build(auto_class: Any, shape: Mapping[str, Any]) -> Any:
    named = dict(shape)
    config = transformers.AutoConfig.for_model(named.pop("model_type"), **named)
    return auto_class.from_config(config, dtype=torch.float32).eval()
