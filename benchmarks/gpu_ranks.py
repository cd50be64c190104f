"""A check that two learner ranks, on two GPUs or on a CPU, make the update of one; `gpu_acceptance` makes it.

The ranks are processes that meet as those of a run do: over NCCL on GPUs, else over gloo.
"""

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_checks import BFLOAT16, FLOAT32, Bench, Figure, distance, require_two
from benchmarks.random_batches import make_table, random_completions, random_requests
from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.ranks import Ranks, Rendezvous, join, leave, open_rendezvous
from ppo_ray.models.saving import find_parts

_LIMIT_S = 300.0
_WAYS = (("ddp", "float32", FLOAT32), ("fsdp2", "float32", FLOAT32), ("fsdp2", "bfloat16", BFLOAT16))
Weights = dict[str, torch.Tensor]


def check_ranks(bench: Bench) -> Iterator[Figure]:
    """Compare updates of two ranks with those of one, in both shardings, before and after a checkpoint."""
    require_two(bench)
    path = bench.write_model("tiny")
    rendezvous, store = open_rendezvous("127.0.0.1", _LIMIT_S)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        calls = [pool.submit(_serve, path, bench.folder, rank, seen[rank], rendezvous) for rank in range(2)]
        answers = [call.result(timeout=_LIMIT_S) for call in calls]
    del store
    for sharding, dtype, limit in _WAYS:
        alone = _learn(path, dtype, Ranks(), sharding, [0, 1])
        name = f"{sharding}, {dtype}, two ranks against one"
        together, resumed = ([answer[sharding, dtype][when] for answer in answers] for when in (0, 1))
        yield Figure(f"{name}: weights", max(distance(alone, one) for one in together), limit)
        yield Figure(f"{name}: after a resume", max(distance(alone, one) for one in resumed), limit)
        first = _learn(path, dtype, Ranks(), sharding, [0])
        parts = find_parts(_checkpoint(bench.folder, sharding, dtype) / "model.safetensors")
        saved = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        yield Figure(f"{name}: checkpoint", distance(first, {name: saved[name].double() for name in first}), limit)


def _checkpoint(folder: Path, sharding: str, dtype: str) -> Path:
    return folder / f"ranks-{sharding}-{dtype}"


def _serve(
    path: Path, folder: Path, rank: int, gpu: str, rendezvous: Rendezvous
) -> dict[tuple[str, str], tuple[Weights, Weights]]:
    """Be one of two ranks: make two updates at once, and again with a checkpoint between them; return the weights."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch looks for it
    torch.set_num_threads(1)
    ranks = join(rendezvous, rank, 2, "nccl" if torch.cuda.is_available() else "gloo", _LIMIT_S, _LIMIT_S)
    found = {}
    for sharding, dtype, _ in _WAYS:
        checkpoint = _checkpoint(folder, sharding, dtype)
        through = _learn(path, dtype, ranks, sharding, [0, 1])
        _learn(path, dtype, ranks, sharding, [0], end=checkpoint)
        ranks.sum([torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")])  # it is written
        found[sharding, dtype] = through, _learn(path, dtype, ranks, sharding, [1], begin=checkpoint)
    leave()
    return found


def _learn(
    path: Path,
    dtype: str,
    ranks: Ranks,
    sharding: str,
    steps: list[int],
    begin: Path | None = None,
    end: Path | None = None,
) -> Weights:
    """Make updates from a checkpoint and to another; return the policy's weights, in float64 on the host."""
    model: Any = ModelConfig.model_construct(path=str(path), dtype=dtype)
    options = UpdateConfig(learning_rate=1e-4, epochs=2, max_grad_norm=1.0)
    given = LearnerConfig(microbatch_tokens=128, sharding=sharding)  # type: ignore[arg-type]
    learner = PPOLearner.load(model, options, given, temperature=0.7, ranks=ranks, checkpoint=begin)
    for step in steps:
        requests = random_requests(15, (2, 8), (4, 16), 512, seed=step)
        learner.update(make_table(requests, random_completions(requests, 512), step), step)
    found = {name: tensor.detach().cpu().double() for name, tensor in learner.named_weights()}
    if end is not None:
        if ranks.leads:
            shutil.rmtree(end, ignore_errors=True)
        ranks.share("the folder is gone")
        learner.save(end)
    return found
