"""CUDA's streams without a GPU: work that is done late, and in any order that the streams' waits allow.

On a GPU an operation is only put into the queue of its stream. Here it is too: its result holds garbage until the work
is done. Work of one stream is done in its order; which stream goes on next is drawn. So a wait that is missing shows as
garbage, or as values from before or after. `synchronize` does the work of a stream; reading a number back does that of
the current stream, as on a GPU. Memory that is freed and given away again while work is queued does not show here.
"""

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Stream:
    """A queue of work, of one process."""

    def __init__(self, gpu: "LateGPU", process: str) -> None:
        """Begin empty."""
        self.gpu, self.process = gpu, process
        self.work: deque[Callable[[], object]] = deque()

    def synchronize(self) -> None:
        """Do all of its work."""
        while self.work:
            self.do_next()

    def do_next(self) -> None:
        """Do the first piece of its work at once."""
        with _disable_current_modes():
            self.work.popleft()()

    def wait_stream(self, other: "Stream") -> None:
        """Let the work that comes next wait for all that the other has now."""
        last = other.work[-1] if other.work else None

        def wait() -> None:
            while last is not None and last in other.work:
                other.do_next()

        self.work.append(wait)


class LateGPU(TorchDispatchMode):
    """Queues every operation in the current stream; `patch` lets torch's functions of streams speak of these."""

    def __init__(self, seed: int, haste: float) -> None:
        """Begin without a stream.

        Args:
            seed: of the order in which streams go on.
            haste: probability that a stream does a piece of its work after any operation; 0: as late as can be.
        """
        super().__init__()
        self._random, self._haste = random.Random(seed), haste
        self.streams: list[Stream] = []
        self.current = self.stream("learner")

    def stream(self, process: str | None = None) -> Stream:
        """Make a stream of a process; None: of the one that is at work."""
        self.streams.append(Stream(self, process or self.current.process))
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Let a stream be the current one."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def synchronize(self, device: Any = None) -> None:
        """Do all work of the current process."""
        for stream in self.streams:
            if stream.process == self.current.process:
                stream.synchronize()

    def enqueue(self, work: Callable[[], object]) -> None:
        """Put work into the current stream, and let any stream go on."""
        self.current.work.append(work)
        for stream in self._random.sample(self.streams, len(self.streams)):
            while stream.work and self._random.random() < self._haste:
                stream.do_next()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Queue an operation; views and new memory are there at once."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.current.synchronize()
            return func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or func.name().startswith(("aten::empty", "aten::new_empty")):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.enqueue(lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0])
        results = func(*args, **kwargs)
        for result in tree_leaves(results):
            result.view(torch.uint8 if result.ndim else result.dtype).fill_(0x5A)

        def compute() -> None:
            for result, found in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                result.copy_(found)

        self.enqueue(compute)
        return results

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Let torch's own functions of streams, and what reads tensors back, speak of this GPU's streams."""
        tolist = torch.Tensor.tolist

        def read(tensor: torch.Tensor) -> Any:
            self.current.synchronize()
            return tolist(tensor)

        def set_stream(stream: Stream) -> None:
            self.current = stream

        patch.setattr(torch.Tensor, "tolist", read)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        for name, stand_in in {
            "stream": self.on,
            "current_stream": lambda device=None: self.current,
            "set_stream": set_stream,
            "synchronize": self.synchronize,
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: SimpleNamespace(uuid="GPU-0"),
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
