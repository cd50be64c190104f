"""The sleep of a vLLM engine that shares its GPU: what it keeps of its weights between its turns.

vLLM's level 1 copies all weights into the host's memory, and back when the engine wakes. Level 2 drops them, which
costs nothing: new weights come before the next batch anyway. It keeps buffers, but no tensor that is neither a
parameter nor a buffer, and no parameter that an update leaves as it is (vllm-project/vllm#29341, NVIDIA-NeMo/RL#2631).
So level 2 is taken only by an engine whose first update has shown that it has nothing of either.
"""

import gc
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ppo_ray.errors import WorkerLost
from ppo_ray.models.tensors import list_names

_LOG = logging.getLogger(__name__)
_GREW = "Memory usage increased after sleeping."  # vLLM's words, vllm/v1/worker/gpu_worker.py


class Sleep:
    """What is asleep of an engine, and whether it has dropped its weights."""

    def __init__(self, llm: Any, frees_memory: bool) -> None:
        """Begin awake.

        Args:
            llm: a `vllm.LLM` whose workers are `WorkerExtension`s.
            frees_memory: whether the engine sleeps, on a GPU; else `sleep` changes nothing.
        """
        self._llm = llm
        self._asleep: set[str] = set()
        self._can_drop: bool | None = None if frees_memory else False
        self._dropped = False
        if frees_memory:
            llm.collective_rpc("let_others_grow")

    @property
    def can_drop(self) -> bool:
        """Whether level 2 loses nothing that an update does not bring back; not known before the first."""
        return bool(self._can_drop)

    def begin(self, keep_weights: bool) -> None:
        """Give back the memory of weights, keys and values.

        Args:
            keep_weights: whether the same weights are needed again; else they are dropped, if they can be.
        """
        if not self._asleep:
            self._dropped = not keep_weights and self.can_drop
            self._llm.sleep(level=2 if self._dropped else 1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, *parts: str) -> None:
        """Bring back what is asleep of `weights` and `kv_cache`; when both are there, vLLM takes requests again."""
        if asleep := [part for part in parts if part in self._asleep]:
            self._llm.wake_up(asleep)
            self._asleep -= set(asleep)

    def check_weights(self) -> None:
        """Refuse to compute with memory that holds nothing.

        Raises:
            WorkerLost: the weights were dropped, and no others have come.
        """
        if self._dropped:
            raise WorkerLost("it dropped its weights when it had generated, and is asked again before others have come")

    def end_update(self) -> None:
        """Learn that all weights are new; the first time also whether they can be dropped from now on."""
        self._dropped = False
        if self._can_drop is None:
            lost = [name for names in self._llm.collective_rpc("find_lost") for name in names]
            self._can_drop = not lost
            if lost:
                _LOG.warning("a sleeping engine keeps its weights on the host, for level 2 loses %s", list_names(lost))


def find_strays(model: torch.nn.Module, spans: list[tuple[int, int]]) -> Iterator[str]:
    """Yield the shapes of tensors that lie in the memory of weights and are neither parameters nor buffers.

    Args:
        model: vLLM's.
        spans: of that memory: first address, and the one behind the last.
    """
    kept = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    device = next(model.parameters()).device
    gc.collect()
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        try:
            place = found.untyped_storage().data_ptr() if found.device == device else None
        except (RuntimeError, NotImplementedError):  # it has no memory of its own
            continue
        if place and place not in kept and any(first <= place < end for first, end in spans):
            yield f"a tensor of shape {list(found.shape)}"


def find_unwritten(model: torch.nn.Module) -> list[str]:
    """Name the parameters that an update has left as they were, before vLLM's reload ends and puts them back."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    untouched: dict[str, int] = {}
    written: set[int] = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load():  # its weights have come, and are in its parameters
            written |= {tensor.data_ptr() for tensor in layer.parameters(recurse=False)}
            continue
        parameters: dict[str, torch.Tensor] = info.kernel_tensors[0] if info.kernel_tensors else {}
        places = {f"{name}.{key}": tensor.data_ptr() for key, tensor in parameters.items() if tensor.numel()}
        if info.load_numel > 0:
            written |= set(places.values())
        else:
            untouched |= places
    return [name for name, place in untouched.items() if place not in written]  # a tied head is the embedding


def weight_spans() -> list[tuple[int, int]]:
    """Return where vLLM has the memory that it loaded weights into: first address, and the one behind the last."""
    from vllm.device_allocator import get_mem_allocator_instance

    allocator: Any = get_mem_allocator_instance()
    return [
        (place, place + data.handle[1]) for place, data in allocator.pointer_to_data.items() if data.tag == "weights"
    ]


def let_others_grow(sleep: Callable[..., None], state: Callable[[], str]) -> Callable[..., None]:
    """Wrap a worker's `sleep`, which asserts that there is more free memory afterwards: on the whole GPU.

    A reward worker or learner rank on the same GPU may take meanwhile what a small engine has freed. vLLM compares when
    the engine is asleep already, and nothing comes after it.

    Args:
        sleep: vLLM's.
        state: returns that of the engine's memory, `"SUSPENDED"` if it is asleep.

    Returns:
        A function that sleeps, and warns where others have grown.
    """

    def sleep_beside_others(level: int = 1) -> None:
        try:
            sleep(level=level)
        except AssertionError as error:
            if str(error) != _GREW:
                raise
            if state() != "SUSPENDED":
                raise WorkerLost(f"it did not give its memory back: {error}") from error
            _LOG.warning("the engine sleeps, but others on its GPU took more memory meanwhile than it gave back")

    return sleep_beside_others
