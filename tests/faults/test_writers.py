"""Ranks that write a checkpoint together and die at any moment: it is there whole or not at all."""

import contextlib
import itertools
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from ppo_ray import checkpoint
from ppo_ray.algo.rewards import RunningMoments
from ppo_ray.checkpoint import RunState
from ppo_ray.config import CheckpointConfig
from ppo_ray.errors import PeersLost
from ppo_ray.learner import ranks
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.ranks import Rendezvous
from ppo_ray.learner.snapshot import LearnerSnapshot
from ppo_ray.learner.state import LearnerState
from ppo_ray.models.saving import TensorFile, find_parts
from ppo_ray.run.checkpoints import Checkpoints
from ppo_ray.weights.snapshot import Buffers
from tests.faults.conftest import Dice

SIZE, TRIALS = 3, 5
FILES = ("model.safetensors", "learner/optimizer.safetensors")
CONTEXT = multiprocessing.get_context("forkserver")  # a rank needs no seconds of its own to import torch
CONTEXT.set_forkserver_preload(["tests.faults.test_writers"])


def write_on(rank: int, rendezvous: Rendezvous, folder: Path, begin: int) -> None:
    """Write a checkpoint after the other, each with its number in every element, until a rank is gone."""
    torch.set_num_threads(1)
    joined = ranks.join(rendezvous, rank, SIZE, "gloo", 60, 60)
    tensors = [{f"layers.{layer}.w": torch.empty(1 << 18) for layer in range(9)} for _ in FILES]
    files = [TensorFile(Path(name), named) for name, named in zip(FILES, tensors, strict=True)]
    checksums: Any = SimpleNamespace(names=frozenset(tensors[0]), frozen={}, offload=Offload())
    buffers = Buffers()
    with contextlib.suppress(PeersLost):
        for step in itertools.count(begin + 1):
            for tensor in (tensor for named in tensors for tensor in named.values()):
                tensor.fill_(step)
            state = LearnerState(step, 0.1, RunningMoments(), "", "", by_tensor=True)
            snapshot = LearnerSnapshot.take(files, state, checksums, {"config.json": b"{}"}, joined, buffers)
            for tensor in (tensor for named in tensors for tensor in named.values()):
                tensor.fill_(-1)  # the learner goes on
            path = folder / f"step-{step:05d}"
            aside = path.with_name(f".{path.name}.{begin:08x}.partial")
            checkpoint.write(path, RunState(step), "", snapshot.write, aside, joined.leads)


def test_ranks_that_die_while_they_write(tmp_path: Path, dice: Dice) -> None:
    found: list[int] = []
    for _ in range(TRIALS):
        begin = found[-1] if found else 0
        rendezvous, store = ranks.open_rendezvous("127.0.0.1", 60)
        arguments = (rendezvous, tmp_path, begin)
        processes = [CONTEXT.Process(target=write_on, args=(rank, *arguments), daemon=True) for rank in range(SIZE)]
        for process in processes:
            process.start()
        seconds = [wait_for(tmp_path / f"step-{begin + number:05d}") for number in (1, 2)]
        time.sleep(dice.uniform(0, 2) * (seconds[1] - seconds[0]))
        dice.choice(processes).kill()
        for process in processes:
            process.join(60)
            assert process.exitcode in (0, -9)
        del store
        found = [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))]
        for step in found[-2:]:
            check(tmp_path / f"step-{step:05d}", step)
    assert found == list(range(1, len(found) + 1))
    assert len(list(tmp_path.glob(".step-*"))) <= TRIALS
    told: list[Any] = []
    run = Checkpoints(tmp_path, CheckpointConfig(), "", told.append)
    path, state = run.newest() or (None, None)
    assert (path, state) == (tmp_path / f"step-{found[-1]:05d}", RunState(found[-1])) and not told
    run.save(RunState(99), lambda *arguments: checkpoint.Pending(lambda: checkpoint.write(*arguments, lambda _: None)))
    run.finish()
    assert list(tmp_path.glob(".step-*")) == []  # what killed ranks left


def wait_for(path: Path) -> float:
    """Wait for a checkpoint, and return the time at which it is seen."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} within 200 s"
        time.sleep(0.002)
    return time.monotonic()


def check(path: Path, step: int) -> None:
    """Check that a checkpoint is whole, of one step, and has been written by all ranks."""
    checkpoint.verify(path)
    assert LearnerState.read(path).policy_version == step
    for name in FILES:
        parts = find_parts(path / name)
        tensors = {key: tensor for part in parts for key, tensor in load_file(part).items()}
        assert len(tensors) == 9 and len(parts) == SIZE
        assert all(bool((tensor == step).all()) for tensor in tensors.values())
