"""Two hosts on this machine: each has a network, processes, shared memory and a name of its own; a cable joins them.

They are Linux namespaces, which end with the first process of each; that one ends when this process closes its pipe,
or is killed. So nothing of them can stay: no interface, no process, no file.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
_PROBE = "mount -t tmpfs tmpfs /dev/shm && hostname here && ip link add cable type veth peer name end"
_FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs -o size=1g tmpfs "$2"
ip link set lo up
echo up
read -r || true
"""


@dataclass(frozen=True)
class Host:
    """One of them."""

    address: str
    pid: int
    """Of its first process, as this machine sees it."""

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command to run it there."""
        return ("nsenter", f"--target={self.pid}", *_NAMESPACES)

    def runs(self, process: psutil.Process) -> bool:
        """Say whether a process of this machine runs there."""
        return os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink(f"/proc/{self.pid}/ns/net")


@cache
def why_no_hosts() -> str | None:
    """Say what is missing for them; None if nothing is."""
    missing = [tool for tool in ("hostname", "ip", "mount", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    probe = subprocess.run(["unshare", *_NAMESPACES, "--fork", "sh", "-c", _PROBE], capture_output=True, text=True)
    return f"may not make hosts: {probe.stderr.strip()}" if probe.returncode else None


@contextlib.contextmanager
def two_hosts(private: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts that see each other and nothing else; they share the file system but for a folder.

    Args:
        private: a folder in whose place each host has an empty one of its own.
    """
    with _host("left", "10.77.0.1", private) as left, _host("right", "10.77.0.2", private) as right:
        cable = ("link", "add", "cable", "netns", str(left.pid), "type", "veth")
        _ip(*cable, "peer", "name", "cable", "netns", str(right.pid))
        for host in (left, right):
            subprocess.run([*host.enter, "ip", "address", "add", f"{host.address}/24", "dev", "cable"], check=True)
            subprocess.run([*host.enter, "ip", "link", "set", "cable", "up"], check=True)
        yield left, right


@contextlib.contextmanager
def _host(name: str, address: str, private: Path) -> Iterator[Host]:
    command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child"]
    process = subprocess.Popen(
        [*command, "bash", "-c", _FIRST_PROCESS, "first", name, str(private)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "up\n", f"host {name} did not come up"
        yield Host(address, psutil.Process(process.pid).children()[0].pid)
    finally:
        process.stdin.close()
        process.wait(30)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
