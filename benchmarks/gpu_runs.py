"""Checks of a GPU, or of two, by whole runs of a tiny model under Ray; `gpu_acceptance` makes them."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu_checks import Bench, Figure, Skipped, require_two

_RUN_S = 240.0
_FLOAT32 = 1e-3
"""Largest mean difference of log-probabilities between engine and learner in float32, nats per token."""

NCCL = ("learner.gpus=1", "rollout.gpus=1", "rollout.dtype=float32", "rollout.weight_transport=nccl")
"""A learner on one GPU, whose weights go to an engine on the other by NCCL."""
TENSOR_PARALLEL = (
    *("rollout.gpus=1", "rollout.tensor_parallel=2", "rollout.dtype=float32", "ray.placement=colocated"),
    *("learner.gpus=1", "learner.workers=2", "learner.threads=1", "learner.sharding=fsdp2"),
)
"""An engine of two ranks, and on the same GPUs two learner ranks that each hold half."""


def write_config(bench: Bench, name: str) -> tuple[Path, Path]:
    """Write the config of a run; returns its file, and the folder of the run."""
    prompts, folder, file = bench.folder / "prompts.jsonl", bench.folder / name, bench.folder / f"{name}.yaml"
    prompts.write_text("".join(json.dumps({"text": f"w{index} w{index + 1} w7"}) + "\n" for index in range(400)))
    config = {
        "output_dir": str(folder),
        "model": {"path": str(bench.write_model("tiny"))},
        "prompts": {"path": str(prompts), "column": "text", "max_tokens": 8},
        "rollout": {"batch_size": 16, "max_response_tokens": 16, "kv_cache_mib": 64},
        "reward": {"function": "benchmarks.random_batches:score_by_length"},
        "ppo": {"log_ratio_clamp": 20.0},
        "evaluation": {"num_prompts": 8, "num_samples": 2},
    }
    file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML too
    return file, folder


def check_run(bench: Bench) -> Iterator[Figure]:
    """Train a tiny model on one GPU; kill the engine in it; go on with the run."""
    _require("ray", "vllm")
    file, folder = write_config(bench, "run")
    options = ("rollout.gpus=1", "learner.gpus=1", "ray.placement=colocated") if bench.on_gpu else ()
    first = _start(file, *options, "steps=6")
    killed = _kill_engine(first, folder / "metrics.jsonl")
    output, _ = first.communicate(timeout=_RUN_S)
    yield Figure("exit code of a run whose engine is killed", first.returncode, 0)
    if first.returncode:
        yield Figure("its last words", output.strip()[-300:])
    yield Figure("engines killed", killed)
    again = _start(file, *options, "steps=8", "--resume")
    again.communicate(timeout=_RUN_S)
    yield Figure("exit code of the run that goes on", again.returncode, 0)
    yield Figure("steps missing", 8 - len(_read_steps(folder)), 0)


def check_nccl(bench: Bench) -> Iterator[Figure]:
    """Send a learner's weights to an engine on another GPU by NCCL, in a run of four steps."""
    yield from _check_pair(bench, "nccl", NCCL)


def check_tensor_parallel(bench: Bench) -> Iterator[Figure]:
    """Train with an engine of two ranks and a learner of two, both on the same two GPUs; weights go by CUDA IPC."""
    yield from _check_pair(bench, "tensor_parallel", TENSOR_PARALLEL)


def _check_pair(bench: Bench, name: str, options: Sequence[str]) -> Iterator[Figure]:
    require_two(bench)
    if not bench.on_gpu:
        raise Skipped("NCCL and tensor-parallel engines need GPUs")
    _require("ray", "vllm")
    file, folder = write_config(bench, name)
    run = _start(file, *options, "steps=4")
    output, _ = run.communicate(timeout=2 * _RUN_S)
    yield Figure("exit code", run.returncode, 0)
    if run.returncode:
        yield Figure("its last words", output.strip()[-300:])
    steps = _read_steps(folder)
    yield Figure("steps missing", 4 - len(steps), 0)
    mismatch = max((step["mismatch/logprob_mean"] for step in steps.values()), default=float("nan"))
    yield Figure("float32 engine against learner, nats", mismatch, _FLOAT32)
    yield Figure("weights on their way, seconds", max((step["time/sync_s"] for step in steps.values()), default=0.0))


def _require(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed")


def _start(file: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ppo_ray", "train", str(file), *options]
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _read_steps(folder: Path) -> dict[int, Any]:
    """Return what a run measured, by step."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {record["step"]: record for record in map(json.loads, lines) if "event" not in record}


def _kill_engine(run: "subprocess.Popen[str]", metrics: Path) -> int:
    """Kill the engine of a run after its first step; returns how many were found."""
    deadline = time.monotonic() + _RUN_S
    while run.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n"):
            engines = [
                process
                for process in psutil.Process(run.pid).children(recursive=True)
                if process.is_running() and "RolloutWorker" in " ".join(process.cmdline())
            ]
            for process in engines:
                process.send_signal(signal.SIGKILL)
            return len(engines)
        time.sleep(0.05)
    return 0
