"""Processes of the arms: their memory, their end."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.compare import child
from benchmarks.compare.memory import PeakMemory
from ppo_ray.errors import WorkerError

SHARERS = """
import mmap, os, sys, time
pages = mmap.mmap(-1, 100 << 20)  # shared with children
pages.write(b"x" * (100 << 20))
parent = os.getpid()
for _ in range(2):
    if os.getpid() == parent and os.fork() == 0:
        sum(pages[::4096])
        break
os.write(1, b"there\\n")
time.sleep(60)
"""


def test_pages_that_two_children_share_count_once():
    process = psutil.Popen([sys.executable, "-c", SHARERS], stdout=-1, text=True)
    memory = PeakMemory(process.pid)
    try:
        assert [process.stdout.readline() for _ in range(3)] == ["there\n"] * 3
        time.sleep(0.2)
        memory.look()
    finally:
        memory.kill()
    assert len(memory.peak_processes) == 3
    assert 100 < memory.peak_mib < 160, memory.peak_processes
    assert not any(psutil.pid_exists(int(name.split()[-1])) for name in list(memory.peak_processes)[1:])


def run(code: str, folder: Path, limit_s: float = 60) -> PeakMemory:
    return child.run([sys.executable, "-c", code], folder / "log", limit_s, lambda: None, {"ADDED": "yes"})


def test_a_process_has_what_is_added_and_its_memory_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    memory = run(
        "import os, time; time.sleep(0.5); print(os.environ['ADDED'], os.environ.get('OMP_NUM_THREADS'))", tmp_path
    )
    assert (tmp_path / "log").read_text() == "yes None\n"
    assert memory.peak_mib > 1


def test_a_failure_names_the_log_and_shows_its_end(tmp_path):
    with pytest.raises(WorkerError, match=r"(?s)ended with 3; its output is in .*log.*the last word"):
        run("print('the last word'); raise SystemExit(3)", tmp_path)


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    with pytest.raises(WorkerError, match="took more than 6 s"):
        run(code, tmp_path, limit_s=6)
    assert not psutil.pid_exists(pid := int((tmp_path / "pid").read_text())) or (
        psutil.Process(pid).status() == psutil.STATUS_ZOMBIE and os.getpid() != pid
    )
