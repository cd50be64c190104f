"""Make a virtual environment with the locked packages, or mend the one that is there; `make setup` runs this.

    python3 requirements/set_up.py cpu     # .venv, for machines without a GPU
    python3 requirements/set_up.py gpu     # .venv, for NVIDIA GPUs
    python3 requirements/set_up.py trl     # .venv-trl, which `make benchmark` compares with

It runs on any Python from 3.7 with nothing installed, so that an unsuitable Python gets a sentence, not a syntax error.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "requirements"
PYTHONS = ("3.11", "3.12", "3.13")
"""Versions that the locks serve, the one that they are tested with most first."""
GLIBC = (2, 31)
"""Oldest that all locked wheels run on."""
DRIVER = 580
"""Oldest major version of NVIDIA's driver that CUDA 13 runs on, which PyPI's torch is built with."""
DISK_GB = {"cpu": 5, "gpu": 12, "trl": 2}
"""Size of an environment with torch's CPU build, or of gpu with CUDA."""
CUDA_GB = 3
"""What torch's CUDA build and its libraries take beyond the CPU build."""


def main() -> None:
    """Set up the environment that the command line names."""
    extra = sys.argv[1] if len(sys.argv) == 2 else ""
    if extra not in DISK_GB:
        refuse(f"EXTRA={extra}: must be cpu or gpu")
    check_machine(platform.system(), platform.machine(), platform.libc_ver())
    if extra == "gpu" and os.environ.get("DRIVER") != "any":
        check_driver(read_driver_version())
    import fcntl  # not there on Windows, which is refused above

    lock = os.open(LOCKS, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends: a second `make setup` waits, and finds all done
    environment = Environment(ROOT / (".venv-trl" if extra == "trl" else ".venv"), extra)
    try:
        if not environment.is_complete():
            environment.install()
    except KeyboardInterrupt:
        refuse("interrupted; the next `make setup` makes the environment anew, from what pip has in its cache", 130)


def refuse(reason: str, code: int = 2) -> NoReturn:
    """Say why there is no environment, and end."""
    print(f"set-up: {reason}", file=sys.stderr)
    sys.exit(code)


def check_machine(system: str, machine: str, libc: tuple[str, str]) -> None:
    """Refuse a machine that the locks have no packages for.

    Args:
        system: as `platform.system()` has it.
        machine: as `platform.machine()` has it.
        libc: name and version of the C library, as `platform.libc_ver()` has them.
    """
    needs = f"the locked packages need Linux on x86-64 with glibc {GLIBC[0]}.{GLIBC[1]} or newer"
    if (system, machine) != ("Linux", "x86_64"):
        refuse(f"{needs}; this is {system} on {machine}")
    if libc[0] != "glibc" or tuple(int(part) for part in libc[1].split(".")[:2]) < GLIBC:
        refuse(f"{needs}; this machine's C library is {' '.join(libc).strip() or 'another one'}")


def read_driver_version() -> str:
    """Return the version of NVIDIA's driver, e.g. 580.95.05; empty without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        if not shutil.which("nvidia-smi"):
            return ""
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return match.group() if match else ""


def check_driver(version: str) -> None:
    """Refuse a driver that is not there or too old for the CUDA of the GPU lock."""
    another = "For the GPUs of another machine: make setup EXTRA=gpu DRIVER=any"
    if not version:
        refuse(f"EXTRA=gpu needs NVIDIA's driver {DRIVER} or newer, and this machine has none. {another}")
    if int(version.split(".")[0]) < DRIVER:
        refuse(f"EXTRA=gpu needs NVIDIA's driver {DRIVER} or newer (CUDA 13); this machine has {version}. {another}")


def find_python(named: str) -> str:
    """Return a Python that the locks serve: the one that PYTHON names, else `python3`, else one of another name.

    Args:
        named: value of PYTHON; empty: it is not set.
    """
    found = {name: describe_python(name) for name in ([named] if named else ["python3"])}
    if not named and found["python3"] not in PYTHONS:
        found.update((f"python{version}", describe_python(f"python{version}")) for version in PYTHONS)
    for name, version in found.items():
        if version in PYTHONS:
            return name
    seen = ", ".join(f"{name} is {version}" for name, version in found.items() if version) or f"no {named or 'python3'}"
    refuse(
        f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]} is needed, with its module venv; found: {seen}. "
        "Install one, or name it: make setup PYTHON=/path/to/python3.12"
    )


def describe_python(command: str) -> str:
    """Return a Python's version, e.g. 3.12, or what is wrong with it; empty: it cannot be started."""
    code = (
        "import sys, sysconfig; version = '%d.%d' % sys.version_info[:2]\n"
        "try: import ensurepip, venv\n"
        "except ImportError: version += ' without venv (Debian: apt install python3-venv)'\n"
        "print(version + (' without the GIL' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''))"
    )
    try:
        result = subprocess.run([command, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


class Environment:
    """A virtual environment with the packages of one lock and, if it is this project's, the developers' tools.

    A file in it, the stamp, is written last: it names what was installed. Another is there while packages are written.
    """

    def __init__(self, path: Path, extra: str) -> None:
        """Describe the environment in `path`, which may be missing, whole or broken."""
        self.path = path
        self.extra = extra
        self.python = path / "bin" / "python"
        self.log = path / "set-up.log"
        self.stamp = path / f".installed-{extra}"
        self.unfinished = path / ".installing"
        self.named = os.environ.get("PYTHON", "")
        self.locks = [extra] if extra == "trl" else [extra, "dev"]

    def is_complete(self) -> bool:
        """Say whether all packages are there, at the versions that the locks have now, and Python starts."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return False
        whole = all((self.path / package / "RECORD").is_file() for package in stamp["packages"])
        return whole and stamp["locks"] == self._digest() and not self._must_be_made()

    def install(self) -> None:
        """Install what the locks say, in a new environment unless that which is there can be used."""
        anew = self._must_be_made()
        if anew:
            if self.python.exists():
                print(f"{self.path.name} is broken, unfinished or of another kind: it is made anew", flush=True)
            python = find_python(self.named)
            print(f"making {self.path.name} with {python} ({describe_python(python)})", flush=True)
            if subprocess.run([python, "-m", "venv", "--clear", str(self.path)]).returncode:
                refuse(f"{python} -m venv {self.path} failed", 1)
        for left in self.path.glob("lib/python*/site-packages/*.dist-info"):
            if not (left / "RECORD").is_file():
                shutil.rmtree(left)  # pip would take the package for whole
        for stamp in self.path.glob(".installed-*"):
            stamp.unlink()
        self.unfinished.touch()
        self._pip_install("--require-hashes", "-r", str(LOCKS / "pip.txt"))
        locks = [LOCKS / f"{name}.txt" for name in self.locks]
        if self.extra != "gpu":
            locks.append(self._find_torch_lock())
        needed = DISK_GB[self.extra] + (CUDA_GB if "torch-cuda.txt" in locks[-1].name else 0)
        free = shutil.disk_usage(str(self.path)).free / 1e9
        if anew and free < needed:
            refuse(f"{self.path.name} needs {needed} GB of disk, and {free:.1f} GB are free in {ROOT}", 1)
        self._pip_install(
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            *(part for lock in locks for part in ("-r", str(lock))),
        )
        if self.extra != "trl":
            self._pip_install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        packages = sorted(
            str(path.relative_to(self.path)) for path in self.path.glob("lib/*/site-packages/*.dist-info")
        )
        self.stamp.write_text(json.dumps({"locks": self._digest(), "packages": packages}, indent=0))
        self.unfinished.unlink()

    def _must_be_made(self) -> bool:
        """Say whether nothing there can be used: no Python that runs, another Python, other or half the packages."""
        others = [stamp for stamp in self.path.glob(".installed-*") if stamp != self.stamp]
        version = describe_python(str(self.python))
        wanted = (describe_python(self.named),) if self.named else PYTHONS
        return bool(others) or self.unfinished.exists() or version not in wanted or not self._has_pip()

    def _has_pip(self) -> bool:
        return any(self.path.glob("lib/python*/site-packages/pip/__main__.py"))

    def _digest(self) -> str:
        """Return a checksum of all that decides what is installed."""
        names = ["pip", *self.locks, *([] if self.extra == "gpu" else ["torch-cpu", "torch-cuda"])]
        files = [
            *(LOCKS / f"{name}.txt" for name in names),
            *([] if self.extra == "trl" else [ROOT / "pyproject.toml"]),
        ]
        return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()

    def _find_torch_lock(self) -> Path:
        """Return the lock of torch's CPU build if pip can see that build, else that of PyPI's with CUDA's libraries."""
        lock = LOCKS / "torch-cpu.txt"
        (version,) = re.findall(r"^torch==(\S+)", lock.read_text(), re.MULTILINE)
        command = [str(self.python), "-m", "pip", "index", "versions", "torch", "--json"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            refuse(f"pip cannot list the builds of torch:\n{result.stderr.strip()}", 1)
        if version in json.loads(result.stdout)["versions"]:
            return lock
        print(
            f"pip sees no torch {version}, so PyPI's torch is installed with the CUDA libraries that it needs: "
            f"2.3 GB more to download and {CUDA_GB} GB more on disk. For the CPU build (0.2 GB), stop this, tell pip "
            "where torch's CPU builds are, and start again: export PIP_EXTRA_INDEX_URL= and the index that torch's "
            "installation page names for CPU",
            flush=True,
        )
        return LOCKS / "torch-cuda.txt"

    def _pip_install(self, *arguments: str) -> None:
        """Run `pip install`, show a line per package, and keep all that it says in the log."""
        locks = [Path(part).read_text() for part in arguments if part.endswith(".txt")]
        total = sum(len(re.findall(r"^[\w.-]+==", lock, re.MULTILINE)) for lock in locks)
        command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off", *arguments]
        variables = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}
        lines = []
        pip = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            number, name = 0, ""
            for line in pip.stdout or ():
                lines.append(line)
                log.write(line)
                log.flush()
                package = re.match(r"(Collecting|Processing|Requirement already satisfied:) (\S+)", line)
                size = re.match(r" +(Downloading|Using cached) \S+\.(whl|gz) (\(.*\))", line)
                if package:
                    number, name = number + 1, package.group(2).rpartition("/")[2]
                if size or line.startswith("Processing"):
                    print(f"[{number}/{total}] {name} {size.group(3) if size else ''}".rstrip(), flush=True)
                elif line.startswith("Installing collected packages") and total > 1:
                    print("installing what was fetched: a minute or two", flush=True)
        if pip.wait():
            said = "".join(line for line in lines if not line.startswith("WARNING"))[-3000:].rstrip()
            refuse(f"pip failed; all that it said is in {self.log}, its last words are:\n{said}", 1)


if __name__ == "__main__":
    main()
