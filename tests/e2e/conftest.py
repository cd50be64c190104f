"""Whole runs as a user starts them: `ppo-ray` in a process of its own, real Ray, tiny real models."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml


@dataclass(frozen=True)
class CommandLine:
    """Runs `ppo-ray` with a Ray session folder of its own, so that what it leaves behind can be told from others'."""

    environment: dict[str, str]
    config: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ppo_ray", *arguments]
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

    def leftovers(self) -> list[str]:
        """Return the processes that still belong to this folder's Ray."""
        mark = self.environment["RAY_TMPDIR"]
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "environ"]):
            environment = process.info["environ"] or {}
            if process.pid != os.getpid() and environment.get("RAY_TMPDIR") == mark:
                found.append(f"{process.pid} {process.info['cmdline']}")
        return found


@pytest.fixture
def ppo_ray(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path: Path) -> Iterator[CommandLine]:
    options = {
        "steps": 3,
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_policy)},
        "prompts": {"path": str(tiny_prompts), "min_chars": 20},
        "rollout": {"workers": 2, "batch_size": 8, "max_context": 64, "kv_cache_mib": 32},
        "reward": {"path": str(tiny_classifier)},
        "ppo": {"learning_rate": 1e-3},
        "learner": {"threads": 1},
        "evaluation": {"num_prompts": 8, "num_samples": 4},
        "ray": {"object_store_mib": 256},
    }
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(options))
    with tempfile.TemporaryDirectory(prefix="pr-") as short:  # Ray's sockets lie below it; their paths must be short
        yield CommandLine(os.environ | {"RAY_TMPDIR": short, "HF_HUB_OFFLINE": "1"}, config)
