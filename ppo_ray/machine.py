"""CPUs, memory and disks that this process may use, what they can do, what a packed file may take, slow imports.

CPUs and memory are those of its container or its job, not those of the machine under it.
"""

import contextlib
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # Intel's and AMD's, Intel's, Arm's
_LEAST_UNPACKED = 64 << 20
TIMES = 100
"""How many times its size a packed file may unpack to: lines of one letter, uncompressed, take sixty."""


def max_memory_of_file(size: int) -> int:
    """Return how many bytes of memory the content of a file may take, which has `size` bytes and may be hostile."""
    return max(_LEAST_UNPACKED, TIMES * size)


def count_cpus() -> int:
    """Return how many CPUs this process may keep busy: its affinity, and no more than its control groups' quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(int(quota) for quota in _cpu_quotas())]))


def measure_memory() -> int:
    """Return how many bytes of memory this process and those beside it may hold, by the smallest limit."""
    return min([psutil.virtual_memory().total, *_memory_limits()])


def measure_disk(folder: Path, num_bytes: int = 256 << 20) -> float:
    """Return how many bytes per second the disk of a folder takes from one process, until they are synced.

    Args:
        folder: need not exist: then the nearest folder above it is written to. What is written is removed again.
        num_bytes: that are written.

    Raises:
        OSError: the disk is full, or may not be written to.
    """
    place = next(above for above in (folder, *folder.parents) if above.is_dir())
    content = os.urandom(4 << 20)  # which no file system can pack
    with tempfile.NamedTemporaryFile(dir=place, prefix=".speed-", buffering=0) as file:
        began = time.monotonic()
        for _ in range(max(1, num_bytes // len(content))):
            file.write(content)
        os.fsync(file.fileno())
        return num_bytes / (time.monotonic() - began)


def return_freed_memory() -> None:
    """Give memory that this process has freed, and its allocator has kept, back to the system."""
    allocator = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # jemalloc's; 4096 stands for all arenas
        allocator.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))
    with contextlib.suppress(AttributeError):  # glibc's
        allocator.malloc_trim(0)


def multiplies_bfloat16() -> bool:
    """Say whether this processor has products of bfloat16; True where that cannot be read."""
    text = _CPUINFO.read_text(errors="replace") if _CPUINFO.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return not lines or not _BFLOAT16_FLAGS.isdisjoint(lines[0].split())


def import_ahead(*modules: str) -> None:
    """Import modules that will be needed; who needs one that cannot be imported gets the error then.

    No garbage is collected meanwhile, and what was imported is never looked through for any: imports make none, and
    looking for it takes a fifth of their time. Where all is imported already, nothing happens.
    """
    missing, collects = [name for name in modules if name not in sys.modules], gc.isenabled()
    if not missing:
        return
    gc.disable()
    try:
        for name in missing:
            with contextlib.suppress(Exception):
                import_module(name)
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _cpu_quotas() -> Iterator[float]:
    """Yield the limits of all control groups above this process, in CPUs."""
    for text in _read_limits("", "cpu.max"):  # "200000 100000", microseconds per period, or "max 100000"
        quota, _, period = text.partition(" ")
        if quota != "max":
            yield int(quota) / int(period)
    periods = _read_limits("cpu", "cpu.cfs_period_us")
    for quota, period in zip(_read_limits("cpu", "cpu.cfs_quota_us"), periods, strict=True):
        if int(quota) > 0:
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[int]:
    """Yield the limits of all control groups above this process, in bytes; without a limit version 1 has a huge one."""
    for text in (*_read_limits("", "memory.max"), *_read_limits("memory", "memory.limit_in_bytes")):
        if text != "max":
            yield int(text)


def _read_limits(controller: str, name: str) -> list[str]:
    """Read a file of this process's control group and of all above it, where they are.

    Args:
        controller: of version 1, which has a tree per controller; "" for version 2.
        name: of the file.
    """
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.is_file() else []
    groups = [line.split(":", 2)[1:] for line in lines]
    own = next((path for names, path in groups if controller in names.split(",")), "/")
    folder = _CGROUPS / controller
    folders = [folder / own.lstrip("/"), *(folder / own.lstrip("/")).parents]
    # in a container the path may be the host's, which is not to be seen: what is left of it is the root
    files = [above / name for above in folders if above.is_relative_to(folder)]
    return [file.read_text().strip() for file in files if file.is_file()]
