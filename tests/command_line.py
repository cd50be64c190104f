"""`ppo-ray` as a user starts it: in a process of its own, with real Ray and tiny real models."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock

OPTIONS = (
    # everything that a learner must remember: running moments, an adaptive coefficient, a learning rate that moves
    *("ppo.score_scaling=mean_std", "ppo.kl_horizon=50", "ppo.warmup_steps=3", "checkpoint.every_steps=2"),
    "ray.ping_timeout_s=15",
)
"""Of undisturbed runs, and of those that are compared with them."""

ADAPTED = ("model.lora.rank=8", "rollout.adapter_sync=adapter", "ppo.learning_rate=0.01", "ppo.warmup_steps=0")
"""Of runs that train adapters, and send engines nothing else."""

NO_FORKS = """
import os, sys
if "ppo_ray.actors.fork_server" in sys.orig_argv:
    os._exit(1)
"""
"""The beginning of a sitecustomize.py that changes single workers: forked ones would not run it."""

_ASKS = re.compile(r'setup_worker\.py .*--worker-id=(?P<worker>\w+).*"PPO_RAY_WORKER": *"(?P<name>[\w-]+)"')
"""The command of a process that waits for the worker that was forked for it."""

STEPS = {"hf": 30, "adapted": 14, "vllm": 12}
"""Steps of these runs, for each engine, and of those with adapters: one run serves all tests that compare with it."""

Undisturbed = Callable[..., Path]


@dataclass(frozen=True)
class CommandLine:
    """Runs `ppo-ray` with a Ray session folder of its own, so that what it leaves behind can be told from others'."""

    environment: dict[str, str]
    config: Path
    prefix: tuple[str, ...] = ()
    """What stands before each command, e.g. to run it on another host."""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [*self.prefix, sys.executable, "-m", "ppo_ray", *arguments]
        return subprocess.Popen(
            command,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def train(self, *overrides: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self.run("train", str(self.config), *overrides, timeout=timeout)

    def put_on_path(self, name: str, text: str) -> None:
        """Write a module beside the config, which the driver and all actors find before any other of its name."""
        (self.config.parent / name).write_text(text)
        paths = [str(self.config.parent), self.environment.get("PYTHONPATH")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def leftovers(self) -> list[str]:
        """Return the processes that still belong to this folder's Ray."""
        mark = self.environment["RAY_TMPDIR"]
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "environ"]):
            environment = process.info["environ"] or {}
            if process.pid != os.getpid() and environment.get("RAY_TMPDIR") == mark:
                found.append(f"{process.pid} {process.info['cmdline']}")
        return found

    def open_to_others(self) -> list[str]:
        """Return what lies in the folder of this folder's Ray and can be entered, read or written by other accounts."""
        left = Path(self.environment["RAY_TMPDIR"]).iterdir()
        return [str(path) for path in left if path.stat().st_mode & 0o077]

    def workers(self) -> dict[str, psutil.Process]:
        """Return the processes of this folder's actors by their names.

        A worker that was forked has the server's environment in /proc; the process that asked for it knows its name.
        """
        found: dict[str, psutil.Process] = {}
        asked: dict[str, str] = {}
        for process in (processes := list(psutil.process_iter(["cmdline"]))):
            if match := _ASKS.search(" ".join(process.info["cmdline"] or ())):
                asked[match["worker"]] = match["name"]
        for process in processes:
            title = " ".join(process.info["cmdline"] or ())
            if not title.startswith("ray::") or title.startswith("ray::IDLE"):  # Ray may start a process too many
                continue
            with contextlib.suppress(psutil.Error):
                environment, name = process.environ(), None
                if environment.get("RAY_TMPDIR") == self.environment["RAY_TMPDIR"]:
                    logs = [file.path for file in process.open_files()]
                    forked = (asked[worker] for worker in asked if any(worker in log for log in logs))
                    name = environment.get("PPO_RAY_WORKER") or next(forked, None)
                if name:
                    found[name] = process
        return found

    def wait_for_workers(self, kind: str, seconds: float = 60) -> list[tuple[str, psutil.Process]]:
        """Return the names and processes of the actors of a kind, of which the last may just have been killed."""
        deadline = time.monotonic() + seconds
        while not (found := [item for item in self.workers().items() if item[0].startswith(kind)]):
            assert time.monotonic() < deadline, f"no {kind} worker within {seconds} s"
            time.sleep(0.05)
        return found

    def end(self, process: subprocess.Popen[str], number: signal.Signals, timeout: float = 90) -> str:
        """Send a signal, wait for the end, and return what was written to stderr."""
        process.send_signal(number)
        return process.communicate(timeout=timeout)[1]

    def wait_until_gone(self, seconds: float = 20) -> list[str]:
        """Wait for the processes of this folder's Ray to end; returns those that stay."""
        deadline = time.monotonic() + seconds
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


def lines(run: Path) -> list[dict[str, Any]]:
    """Read the steps of a run's metrics, but for seconds and memory; a line that is being written is left out."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("time/", "memory/"))}
        for record in _records(run)
        if "event" not in record
    ]


def seconds_of_steps(run: Path) -> list[float]:
    """Read how long each step of a run took."""
    return [record["time/step_s"] for record in _records(run) if "event" not in record]


def events(run: Path) -> list[dict[str, Any]]:
    """Read the events among a run's metrics."""
    return [record for record in _records(run) if "event" in record]


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int, seconds: float = 400) -> None:
    """Wait until a run has made so many steps."""
    deadline = time.monotonic() + seconds
    while len(lines(run)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{len(lines(run))} of {steps} steps within {seconds} s"
        time.sleep(0.02)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that is made once in a test session, by whichever of its processes needs it first."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / ".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / ".made").touch()
    return folder


def make_undisturbed(
    models: tuple[Path, Path, Path], factory: pytest.TempPathFactory, engine: str, steps: int, options: tuple[str, ...]
) -> Path:
    """Make a run that nothing happens to, once per test session; what it said is in `stdout` beside it.

    Args:
        models: policy, classifier and prompts.
        factory: of the session's folders.
        engine: of its rollout workers.
        steps: that it makes.
        options: beside `OPTIONS`.

    Returns:
        Its `output_dir`.
    """

    def make(folder: Path) -> None:
        with tiny_command_line(*models, folder) as command_line:
            result = command_line.train(f"rollout.engine={engine}", f"steps={steps}", "report=true", *OPTIONS, *options)
            assert result.returncode == 0, result.stderr
            assert command_line.leftovers() == []
        (folder / "stdout").write_text(result.stdout)

    return made_once(factory, "-".join(["undisturbed", engine, str(steps), *options]), make) / "run"


def orphaned_shared_memory() -> set[str]:
    """Return what lies in /dev/shm and belongs to no living process."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used.update(line.split()[-1] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line)
            used.update(str(file.readlink()) for file in (process / "fd").iterdir())
    return {str(path) for path in Path("/dev/shm").iterdir()} - used


def _records(run: Path) -> Iterator[dict[str, Any]]:
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


@contextlib.contextmanager
def tiny_command_line(policy: Path, classifier: Path, prompts: Path, folder: Path) -> Iterator[CommandLine]:
    """Write a config of tiny models that runs in `folder / "run"`, and give it a Ray folder of its own."""
    options = {
        "steps": 3,
        "report": False,  # a second per run
        "output_dir": str(folder / "run"),
        "model": {"path": str(policy)},
        "prompts": {"path": str(prompts), "min_chars": 20, "min_tokens": 2, "max_tokens": 8},
        "rollout": {
            "workers": 2,
            "batch_size": 8,
            "min_response_tokens": 4,
            "max_response_tokens": 16,
            "max_context": 64,
            "kv_cache_mib": 32,
            "weight_bucket_mib": 1,
        },
        "reward": {"path": str(classifier)},
        "ppo": {"learning_rate": 1e-3},
        "learner": {"threads": 1},
        "evaluation": {"num_prompts": 8, "num_samples": 4},
        "ray": {"object_store_mib": 256},
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(options))
    # Ray's sockets lie below it; their paths must be short. A part of Ray that is just ending may still write there
    with tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True) as short:
        yield CommandLine(os.environ | {"RAY_TMPDIR": short, "HF_HUB_OFFLINE": "1"}, config)
