"""A stand-in for NCCL that behaves as NCCL does between machines; Python imports it where PYTHONPATH names this folder.

As NCCL it listens on the interface that NCCL_SOCKET_IFNAME names, else on one that is not loopback, carries host and
port in its id, blocks until all ranks have come, and fails whoever waits when it is aborted. Tensors pass through a
store of torch's. What else of CUDA vLLM's code touches on its way is replaced too. Where FAKE_NCCL_DEATH names a file,
the first engine that comes to a meeting removes it and dies there.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any, ClassVar

_NCCL = "vllm.distributed.device_communicators.pynccl_wrapper"
_GROUPS = "vllm.distributed.weight_transfer.nccl_common"
_LIMIT_S = 60.0


def choose_address() -> str:
    """Return the address of the interface that NCCL would take."""
    import socket

    import psutil

    named = os.environ.get("NCCL_SOCKET_IFNAME", "")
    found = {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }
    if named:  # NCCL takes names as prefixes, but for one behind "="
        found = {
            name: found[name] for name in found if (name == named[1:] if named[0] == "=" else name[:2] == named[:2])
        }
    return next((found[name] for name in found if name != "lo"), found.get("lo", "no interface"))


class Library:
    """Stands in for `NCCLLibrary`: gives ids."""

    stores: ClassVar[list[Any]] = []

    def ncclGetUniqueId(self) -> Any:
        import ctypes

        import torch.distributed as dist

        host = choose_address()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_LIMIT_S))
        self.stores.append(store)
        return (ctypes.c_byte * 128).from_buffer_copy(f"{host}:{store.port}".encode().ljust(128, b"\0"))


class Communicator:
    """Stands in for `PyNcclCommunicator`."""

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: object) -> None:
        import torch.distributed as dist

        host, _, port = unique_id.rstrip(b"\0").decode().rpartition(":")
        limit = timedelta(seconds=_LIMIT_S)
        self.rank, self.world_size, self.aborted, self.count = rank, world_size, False, 0
        self.store = dist.TCPStore(host, int(port), wait_for_workers=False, timeout=limit)
        death = os.environ.get("FAKE_NCCL_DEATH", "")
        if rank and os.path.exists(death):
            os.remove(death)
            os.kill(os.getpid(), signal.SIGKILL)
        self.store.set(f"here/{rank}", "")
        self._wait([f"here/{other}" for other in range(world_size)])

    def broadcast(self, tensor: Any, src: int, stream: object = None) -> None:
        import torch

        assert src == 0
        key, self.count = f"tensor/{self.count}", self.count + 1
        raw = tensor.view(torch.uint8)
        if self.rank == 0:
            self.store.set(key, raw.numpy().tobytes())
        else:
            self._wait([key])
            raw.copy_(torch.frombuffer(bytearray(self.store.get(key)), dtype=torch.uint8))
        self.store.set(f"{key}/{self.rank}", "")
        self._wait([f"{key}/{other}" for other in range(self.world_size)])

    def destroy(self) -> None:
        self.aborted = True

    def _wait(self, keys: list[str]) -> None:
        began = time.monotonic()
        while not self.store.check(keys):
            if self.aborted or time.monotonic() - began > _LIMIT_S:
                raise RuntimeError("the group was aborted" if self.aborted else "not all ranks came")
            time.sleep(0.01)


class Stream:
    def synchronize(self) -> None: ...


def replace_nccl(module: ModuleType) -> None:
    """Replace what a module of vLLM's has of NCCL."""
    if module.__name__ == _NCCL:
        module.NCCLLibrary = Library  # type: ignore[attr-defined]
        return
    import contextlib

    import torch
    import vllm.distributed.weight_transfer.packed_tensor as packed

    module.uid_init_process_group = Communicator  # type: ignore[attr-defined]
    packed._get_streams = lambda device, count: [Stream()] * count  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]


class Finder(importlib.abc.MetaPathFinder):
    """Loads the two modules as they are, and replaces NCCL in them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in (_NCCL, _GROUPS):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            replace_nccl(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
