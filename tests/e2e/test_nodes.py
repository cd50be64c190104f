"""One run in several layouts: however many workers, ranks, nodes and hosts, it samples and learns the same."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from safetensors.numpy import load_file

from ppo_ray import trajectory
from ppo_ray.models.saving import find_parts
from tests.command_line import CommandLine, events, lines, made_once, tiny_command_line, wait_for_steps
from tests.hosts import Host, two_hosts, why_no_hosts
from tests.ray_cluster import SMALL_STORE, ray_cluster

pytestmark = pytest.mark.slow
STEPS = 6
FAKE_NCCL = Path(__file__).parents[1] / "fake_nccl"
OPTIONS = ("rollout.engine=hf", f"steps={STEPS}", "checkpoint.every_steps=2", "ppo.learning_rate=1e-4")
WITHOUT_SPLIT = ("worker", "rollout_logprobs", "score", *trajectory.LEARNED_FIELDS)
"""Columns that name a worker, or hold floats, whose last bits depend on what is computed together."""


@pytest.fixture(scope="session")
def alone(
    tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the run of one rollout worker and one learner rank on one node."""

    def make(folder: Path) -> None:
        with tiny_command_line(tiny_policy, tiny_classifier, tiny_prompts, folder) as command_line:
            result = command_line.train(*OPTIONS, "rollout.workers=1")
            assert result.returncode == 0, result.stderr

    return made_once(tmp_path_factory, "alone", make) / "run"


@pytest.fixture
def cluster(ppo_ray: CommandLine) -> Iterator[Cluster]:
    """Start three nodes."""
    with ray_cluster(ppo_ray.environment, head_cpus=2) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=SMALL_STORE)
        yield cluster


def sampled(run: Path) -> list[object]:
    files = sorted((run / "trajectories").glob("*.parquet"))
    assert len(files) == STEPS
    return [pq.read_table(file).drop_columns([*WITHOUT_SPLIT]).to_pylist() for file in files]


def largest_difference(run: Path, other: Path) -> float:
    def read(path: Path) -> dict[str, np.ndarray]:
        return {name: tensor for part in find_parts(path) for name, tensor in load_file(part).items()}

    pairs = [
        (read(folder / "checkpoints" / "final" / name) for folder in (run, other))
        for name in ("model.safetensors", "value_head/value_head.safetensors")
    ]
    return max(float(np.abs(a[key] - b[key]).max()) for a, b in pairs for key in a)


def nodes_of(ppo_ray: CommandLine) -> dict[str, int]:
    """Return the process id of each actor's raylet, which is its parent."""
    return {name: psutil.Process(process.pid).ppid() for name, process in ppo_ray.workers().items()}


@pytest.mark.timeout(900)
def test_three_nodes(ppo_ray: CommandLine, cluster: Cluster, tmp_path: Path, alone: Path) -> None:
    # a node has two CPUs, a rank reserves five thirds, the others a third each: no two nodes hold all, none two ranks
    several = ("rollout.workers=2", "learner.workers=2", "learner.threads=5")
    options = (*OPTIONS, *several, f"ray.address={cluster.address}")
    spread = tmp_path / "spread"
    process = ppo_ray.start("train", str(ppo_ray.config), *options, f"output_dir={spread}")
    wait_for_steps(process, spread, 1)
    nodes = nodes_of(ppo_ray)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert len(nodes) == 5 and len(set(nodes.values())) == 3
    assert nodes["learner-0"] != nodes["learner-1"]
    workers = pq.read_table(spread / "trajectories" / "step-00000.parquet").column("worker").to_pylist()
    assert workers == ["rollout-0"] * 4 + ["rollout-1"] * 4
    assert sampled(spread) == sampled(alone)
    assert largest_difference(spread, alone) < 1e-5

    disturbed = tmp_path / "disturbed"
    process = ppo_ray.start("train", str(ppo_ray.config), *options, f"output_dir={disturbed}")
    wait_for_steps(process, disturbed, 3)
    ppo_ray.workers()["learner-1"].kill()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert [line["step"] for line in lines(disturbed)] == list(range(STEPS))
    assert largest_difference(disturbed, spread) == 0
    kinds = {event["event"]: event["worker"] for event in events(disturbed)}
    assert kinds == {"worker_replaced": "learner-1", "learner_rebuilt": "learner-1"}, output


def start_ray(host: Host, environment: dict[str, str], *options: str) -> None:
    """Start a node on a host; it ends with it."""
    command = [*host.enter, str(Path(sys.executable).with_name("ray")), "start", f"--node-ip-address={host.address}"]
    sizes = ("--num-cpus=3", f"--object-store-memory={SMALL_STORE}")
    started = subprocess.run([*command, *sizes, *options], env=environment, text=True, capture_output=True, timeout=120)
    assert started.returncode == 0, started.stderr


@pytest.mark.skipif(bool(why_no_hosts()), reason=str(why_no_hosts()))
@pytest.mark.timeout(900)
def test_two_hosts(ppo_ray: CommandLine, tmp_path: Path, alone: Path) -> None:
    """Hosts that share nothing but files: what works by a loopback address or shared memory alone shows here."""
    environment, run = ppo_ray.environment, tmp_path / "run"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    with two_hosts(Path(environment["RAY_TMPDIR"])) as (left, right):
        start_ray(left, environment, "--head", "--port=6379", "--include-dashboard=false")
        start_ray(right, environment, f"--address={left.address}:6379")
        # a host has three CPUs, a rank reserves five thirds: one rank on each, and room for all others beside it
        several = ("rollout.workers=2", "reward.workers=2", "learner.workers=2", "learner.threads=5")
        options = (*OPTIONS, *several, f"ray.address={left.address}:6379")
        process = replace(ppo_ray, prefix=left.enter).start("train", str(ppo_ray.config), *options)
        wait_for_steps(process, run, 1)
        homes = {name: left if left.runs(worker) else right for name, worker in ppo_ray.workers().items()}
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert homes["learner-0"] != homes["learner-1"]
    assert sampled(run) == sampled(alone)
    assert largest_difference(run, alone) < 1e-5
    assert events(run) == [], output


@pytest.mark.skipif(bool(why_no_hosts()), reason=str(why_no_hosts()))
@pytest.mark.timeout(900)
def test_nccl_joins_a_learner_on_one_host_and_an_engine_on_another(ppo_ray: CommandLine, tmp_path: Path) -> None:
    """Both ranks of the learner are on one host, where they meet on loopback; the engine must reach them all the same.

    NCCL's stand-in listens where NCCL would. The engine's weights are proved before the first step by the self-check,
    and at each step by its log-probabilities. The engine dies when all meet for the first time, which costs nobody but
    itself: its successor joins a new group.
    """
    environment, run = ppo_ray.environment, tmp_path / "run"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PPO_RAY_GPUS_ARE_NUMBERS": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FAKE_NCCL), *filter(None, [environment.get("PYTHONPATH")])])
    environment["FAKE_NCCL_DEATH"] = str(tmp_path / "death")
    (tmp_path / "death").touch()
    gpus = ("rollout.workers=1", "rollout.gpus=1", "rollout.dtype=float32", "learner.workers=2", "learner.gpus=1")
    with two_hosts(Path(environment["RAY_TMPDIR"])) as (left, right):
        start_ray(left, environment, "--head", "--port=6379", "--include-dashboard=false", "--num-gpus=2")
        start_ray(right, environment, f"--address={left.address}:6379", "--num-gpus=1")
        options = (f"ray.address={left.address}:6379", "rollout.weight_transport=nccl", f"steps={STEPS}", *gpus)
        process = replace(ppo_ray, prefix=left.enter).start("train", str(ppo_ray.config), *options)
        wait_for_steps(process, run, 1)
        homes = {name: left if left.runs(worker) else right for name, worker in ppo_ray.workers().items()}
        output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert homes["learner-0"] == homes["learner-1"] == left and homes["rollout-0"] == right
    steps = lines(run)
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert max(step["mismatch/logprob_mean"] for step in steps) < 1e-3
    replaced = [(event["event"], event["worker"]) for event in events(run)]
    assert replaced == [("worker_replaced", "rollout-0")], output
