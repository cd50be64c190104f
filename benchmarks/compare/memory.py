"""Peak memory of a process and all that it starts, pages that several of them share counted once."""

import contextlib
import threading
import time
from pathlib import Path

import psutil

_SHORTEST_S = 0.25
_SHARE = 50  # a look takes at most this part of the time, lest it slow down what is measured


class PeakMemory(threading.Thread):
    """Looks at a tree of processes again and again, until it is stopped.

    What counts is PSS: a page that n processes map is a 1/n of each, so the sum counts it once, Ray's object store too.
    A process that was seen once counts until it ends, whoever its parent is by then.
    """

    def __init__(self, pid: int) -> None:
        """Begin to look when started.

        Args:
            pid: of the tree's root.
        """
        super().__init__(daemon=True, name="peak memory")
        self._root = psutil.Process(pid)
        self._seen: set[psutil.Process] = {self._root}
        self._stopped = threading.Event()
        self.peak_mib = 0.0
        self.peak_processes: dict[str, float] = {}
        """MiB of each process at the peak, by name and pid."""

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopped.is_set():
            began = time.monotonic()
            self.look()
            self._stopped.wait(max(_SHORTEST_S, _SHARE * (time.monotonic() - began)))

    def look(self) -> None:
        """Add up what all have now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen.update(self._root.children(recursive=True))
        self._seen = {process for process in self._seen if process.is_running()}
        found = {process: pss_mib(process.pid) for process in self._seen}
        total = sum(found.values())
        if total > self.peak_mib:
            self.peak_mib = total
            self.peak_processes = {_name(process): round(mib, 1) for process, mib in found.items()}

    def stop(self) -> None:
        """End the looking; `peak_mib` is final."""
        self._stopped.set()
        self.join(timeout=60)

    def kill(self) -> None:
        """End all processes that were seen and still run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen.update(self._root.children(recursive=True))
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._seen, timeout=30)


def pss_mib(pid: int) -> float:
    """Return a process's proportional set size, MiB; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _name(process: psutil.Process) -> str:
    try:
        first = (process.cmdline() or [process.name()])[0]
    except psutil.Error:
        first = "gone"
    return f"{Path(first).name} {process.pid}"
