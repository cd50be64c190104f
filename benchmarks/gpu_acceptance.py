"""Whether everything works on this GPU: `make gpu-check`, about ten minutes on one card.

Each check prints its figures and their limits. A check whose library is not installed is skipped by name. Without a GPU
the checks run on the CPU with tiny shapes, and those that need a GPU are skipped. The exit code is 1 if a check failed.
What needs two GPUs (NCCL between learner and engine, fsdp2 and tensor-parallel ranks) is not checked here.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu
from benchmarks.card import find_peak
from benchmarks.gpu_checks import (
    BFLOAT16,
    Bench,
    Check,
    Figure,
    Skipped,
    check_lending,
    check_logits,
    check_machine,
    check_sums,
    check_update,
)
from benchmarks.random_batches import make_table, random_requests
from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.models.loading import default_device
from ppo_ray.plan.memory import learner_terms
from ppo_ray.plan.sizes import ModelSizes
from ppo_ray.rollout.engine import Engine, Sampling

_RUN_S = 240.0


def _check_engine(bench: Bench, dtype: str, engine: Engine, path: Path, limit: float) -> Iterator[Figure]:
    """Compare an engine's log-probabilities with the learner's, before and after new weights."""
    model = ModelConfig.model_construct(path=str(path), dtype=dtype)
    learner = PPOLearner.load(model, UpdateConfig(learning_rate=1e-3), LearnerConfig(), temperature=1.0)
    for version, when in enumerate(("own weights", "new weights")):
        requests = random_requests(64, (2, 8), (4, 16), 512, seed=version)
        completions = engine.generate(requests, Sampling())
        found = learner.update(make_table(requests, completions, version), version)
        yield Figure(f"{dtype} engine against learner, {when}, nats", found.metrics["mismatch/logprob_mean"], limit)
        if version == 0:
            engine.load_weights(learner.weights())
    alone = [engine.generate([request], Sampling())[0] for request in requests[:8]]
    other = sum(one.response_ids != completions[index].response_ids for index, one in enumerate(alone))
    yield Figure(f"{dtype} responses that depend on their batch, of 8", other)


def check_vllm(bench: Bench) -> Iterator[Figure]:
    """Compare vLLM with the learner, in both dtypes."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, GPU_ENVIRONMENT, VLLMEngine

    os.environ.update(GPU_ENVIRONMENT if bench.on_gpu else CPU_ENVIRONMENT)
    path = bench.write_model("tiny")
    for dtype, limit in (("float32", 1e-3), ("bfloat16", BFLOAT16)):
        engine = VLLMEngine(str(path), dtype=dtype, max_context=64, kv_cache_mib=64)
        try:
            yield from _check_engine(bench, dtype, engine, path, limit)
        finally:
            engine.close()


def check_run(bench: Bench) -> Iterator[Figure]:
    """Train a tiny model on one GPU by Ray; kill the engine in it; go on with the run."""
    missing = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed")
    prompts = bench.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"w{index} w{index + 1} w7"}) + "\n" for index in range(400)))
    gpus, run, file = int(bench.on_gpu), bench.folder / "run", bench.folder / "run.yaml"
    config = {
        "output_dir": str(run),
        "model": {"path": str(bench.write_model("tiny"))},
        "prompts": {"path": str(prompts), "column": "text", "max_tokens": 8},
        "rollout": {"gpus": gpus, "batch_size": 16, "max_response_tokens": 16, "kv_cache_mib": 64},
        "reward": {"function": "benchmarks.random_batches:score_by_length"},
        "ppo": {"log_ratio_clamp": 20.0},
        "learner": {"gpus": gpus},
        "evaluation": {"num_prompts": 8, "num_samples": 2},
        "ray": {"placement": "colocated" if bench.on_gpu else "apart"},
    }
    file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML too
    command = [sys.executable, "-m", "ppo_ray", "train", str(file)]
    root = Path(__file__).resolve().parents[1]
    first = subprocess.Popen(
        [*command, "steps=6"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed = _kill_engine(first, run / "metrics.jsonl")
    output, _ = first.communicate(timeout=_RUN_S)
    yield Figure("exit code of a run whose engine is killed", first.returncode, 0)
    if first.returncode:
        yield Figure("its last words", output.strip()[-300:])
    yield Figure("engines killed", killed)
    again = subprocess.run(
        [*command, "steps=8", "--resume"], cwd=root, capture_output=True, timeout=_RUN_S, check=False
    )
    yield Figure("exit code of the run that goes on", again.returncode, 0)
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    steps = {record["step"] for record in map(json.loads, lines) if "event" not in record}
    yield Figure("steps missing", 8 - len(steps), 0)


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


def check_memory(bench: Bench) -> Iterator[Figure]:
    """Run steps of a large shape, and compare its peak with the plan's."""
    shape = "1b" if bench.on_gpu else "tiny"
    options = argparse.Namespace(response_tokens=64, batch_size=None, microbatch_tokens=8192, steps=2)
    peak = find_peak(bench.device, None if bench.on_gpu else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        result = gpu.measure(shape, options, peak, Path(folder))
        config = gpu.make_config(shape, options, Path(folder))
        terms = [term for term in learner_terms(config, ModelSizes.read(config), 0) if term.device == "gpu"]
    planned = sum(term.num_bytes for term in terms if term.what != "CUDA") + 2 * result.parameters
    yield Figure(f"{shape}: seconds per step", round(result.seconds["step_s"], 3))
    yield Figure(f"{shape}: learner's share of the card's peak", round(result.learner_mfu, 3))
    yield Figure(f"{shape}: peak memory, GiB", round(result.peak_memory_gib, 2))
    if bench.on_gpu:
        beyond = result.peak_memory_gib * 2**30 / planned - 1
        yield Figure(f"{shape}: peak beyond the plan's", round(beyond, 3), 0.05)


CHECKS: dict[str, Check] = {
    "machine": check_machine,
    "update": check_update,
    "logits": check_logits,
    "sums": check_sums,
    "lending": check_lending,
    "vllm": check_vllm,
    "run": check_run,
    "memory": check_memory,
}
"""In the order in which they are made."""


def main(arguments: list[str] | None = None) -> int:
    """Make the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="which checks to make")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    console = Console()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(default_device(), Path(folder))
        for name in options.only:
            results[name] = _make_check(console, name, bench)
    failed = [name for name, result in results.items() if result["outcome"] == "failed"]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    console.print(f"{len(failed)} of {len(results)} checks failed" + (f": {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _make_check(console: Console, name: str, bench: Bench) -> dict[str, Any]:
    """Make one check and print its figures; a check that raises has failed, and the next one is made."""
    start, figures, outcome = time.perf_counter(), [], "passed"
    try:
        for figure in CHECKS[name](bench):
            figures.append(asdict(figure) | {"passed": figure.passed})
            value = f"{figure.value:.3g}" if isinstance(figure.value, float) else figure.value
            limit = "" if figure.limit is None else f" (at most {figure.limit:g})"
            console.print(
                f"{'ok    ' if figure.passed else 'FAILED'} {name}: {figure.name} {value}{limit}", markup=False
            )
            outcome = outcome if figure.passed else "failed"
    except Skipped as why:
        outcome = "skipped"
        console.print(f"skipped {name}: {why}", markup=False)
    except Exception as error:  # whatever it is, the other checks are made
        outcome = "failed"
        figures.append({"name": "error", "value": "".join(traceback.format_exception(error))[-2000:], "passed": False})
        console.print(f"FAILED {name}: {type(error).__name__}: {error}", markup=False)
    return {"outcome": outcome, "seconds": round(time.perf_counter() - start, 1), "figures": figures}


if __name__ == "__main__":
    raise SystemExit(main())
