"""Whether everything works on this GPU: `make gpu-check`, about ten minutes on one card.

Each check prints its figures and their limits. A check whose library is not installed is skipped by name. Without a GPU
the checks run on the CPU with tiny shapes, and those that need a GPU are skipped. The last three need two GPUs (learner
ranks, NCCL between learner and engine, tensor-parallel ranks) and are skipped where there is one. The exit code is 1 if
a check failed.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu
from benchmarks.card import find_peak, free_bytes
from benchmarks.gpu_checks import (
    BFLOAT16,
    Bench,
    Check,
    Figure,
    Skipped,
    check_attention,
    check_codes,
    check_lending,
    check_logits,
    check_machine,
    check_sums,
    check_update,
)
from benchmarks.gpu_ranks import check_ranks
from benchmarks.gpu_runs import check_nccl, check_run, check_tensor_parallel
from benchmarks.random_batches import make_table, random_requests
from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.models.loading import default_device
from ppo_ray.plan.learner import learner_terms
from ppo_ray.plan.sizes import ModelSizes
from ppo_ray.rollout.engine import Engine, Sampling


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
            before = free_bytes(bench.device)
            engine.sleep(keep_weights=False)
            yield Figure(f"{dtype} memory that sleep frees, MiB", (free_bytes(bench.device) - before) >> 20)
            engine.load_weights(learner.weights())  # which it has dropped, if it can
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
        engine = VLLMEngine(str(path), dtype=dtype, max_context=64, kv_cache_mib=64, may_sleep=True)
        try:
            yield from _check_engine(bench, dtype, engine, path, limit)
            yield Figure(f"{dtype} engine drops its weights in sleep", str(engine.drops_weights))
        finally:
            engine.close()


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
    "attention": check_attention,
    "codes": check_codes,
    "logits": check_logits,
    "sums": check_sums,
    "lending": check_lending,
    "vllm": check_vllm,
    "run": check_run,
    "memory": check_memory,
    "ranks": check_ranks,
    "nccl": check_nccl,
    "tensor_parallel": check_tensor_parallel,
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
