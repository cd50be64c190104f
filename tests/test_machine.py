"""CPUs and memory of containers: control groups of both versions, as Docker, Kubernetes and Slurm make them."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from ppo_ray import machine
from ppo_ray.plan import demand

Container = Callable[[str, Mapping[str, str]], None]


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    """Return a function that shows the process other control groups: `/proc/self/cgroup` and files with limits."""

    def show(own: str, files: Mapping[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    return show


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        ("0::/\n", {"cpu.max": "400000 100000", "memory.max": "1073741824"}, 4, 1 << 30),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1, None),  # half a CPU
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 64, None),
        (  # a job's group has no limit, the one above it has
            "0::/slurm/job_1\n",
            {"slurm/job_1/cpu.max": "max 100000", "slurm/cpu.max": "800000 100000", "slurm/memory.max": "2147483648"},
            8,
            2 << 30,
        ),
        (  # version 1; the path is the host's, as Docker shows it
            "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            {
                "cpu/cpu.cfs_quota_us": "250000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "3221225472",
            },
            2,
            3 << 30,
        ),
        (
            "4:memory:/\n3:cpu,cpuacct:/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            64,
            None,
        ),
        ("", {}, 64, None),
    ],
)
def test_the_smallest_limit_counts(
    container: Container, own: str, files: Mapping[str, str], cpus: int, memory: int | None
) -> None:
    container(own, files)
    assert machine.count_cpus() == cpus
    assert machine.measure_memory() == (memory or psutil.virtual_memory().total)


def test_a_process_bound_to_one_cpu_counts_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from ppo_ray.machine import count_cpus; print(count_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("collects", [True, False])
def test_imports_leave_the_collection_of_garbage_as_it_was(collects: bool, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "imported_ahead.py").write_text("import gc\ncollects = gc.isenabled()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imported_ahead", raising=False)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        machine.import_ahead("no_such_module", "imported_ahead")
        assert sys.modules["imported_ahead"].collects is False
        assert gc.isenabled() == collects
        frozen, made = gc.get_freeze_count(), [[number] for number in range(1_000)]
        machine.import_ahead("imported_ahead")  # it is there: what the program made meanwhile is not frozen too
        assert gc.get_freeze_count() < frozen + len(made)  # less by what ended since
    finally:
        (gc.enable if before else gc.disable)()


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    seconds = iter([10.0, 12.0])

    def read_clock() -> float:
        seen.append([file.stat().st_size for file in tmp_path.iterdir()])
        return next(seconds)

    monkeypatch.setattr(machine.time, "monotonic", read_clock)
    assert machine.measure_disk(tmp_path / "not" / "there", 8 << 20) == 4 << 20
    assert seen == [[0], [8 << 20]] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cpuinfo", "multiplies"),
    [
        ("model name : a\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f avx512bw\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("processor : 0\n", True),  # it does not say
    ],
)
def test_a_processors_flags_say_whether_it_multiplies_bfloat16(
    cpuinfo: str, multiplies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.multiplies_bfloat16() is multiplies


MEMORY = """
import numpy, psutil
from ppo_ray.machine import return_freed_memory
from pathlib import Path
measure = lambda: psutil.Process().memory_info().rss >> 20
before, held = measure(), [numpy.ones(1 << 17) for _ in range(300)]  # of 1 MiB each
held = held[::150]  # they keep what lies beside them from the end of the heap
freed = measure()
return_freed_memory()
print(freed - before, measure() - before, "libjemalloc" in Path("/proc/self/maps").read_text())
"""


@pytest.mark.parametrize("allocator", ["jemalloc", "glibc"])
def test_an_actors_freed_memory_is_kept_until_it_is_returned(allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # tests that start engines in this process set it
    own = {name: value for name, value in demand.CPU_ALLOCATION.items() if name != "LD_PRELOAD"}
    if allocator == "jemalloc":
        own |= demand._prefer_jemalloc()
    command = [sys.executable, "-c", MEMORY]
    found = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True, timeout=60)
    assert not found.stderr
    kept, rest, is_jemalloc = found.stdout.split()
    assert int(kept) > 280 and int(rest) < 50
    assert (is_jemalloc == "True") == (allocator == "jemalloc")


SPLIT = """
import numpy, psutil
measure = lambda: psutil.Process().memory_info().rss >> 20
large = [numpy.ones(1 << 17) for _ in range(400)]  # of 1 MiB each
before = measure()
del large
small = [numpy.ones(1 << 13) for _ in range(6000)]  # of 64 KiB
print(measure() - before)
"""


def test_small_tensors_are_put_where_large_ones_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    command = [sys.executable, "-c", SPLIT]
    environment = {**os.environ, **demand.CPU_ALLOCATION, **demand._prefer_jemalloc()}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert int(found.stdout) < 50


def test_an_allocator_that_the_user_preloads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert demand._prefer_jemalloc() == {}
