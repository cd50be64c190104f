"""Nodes that are lost with all that is on them: the work goes on where there is room, and ends the same."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.command_line import OPTIONS, STEPS, CommandLine, events, lines, wait_for_steps
from tests.faults.conftest import Same
from tests.ray_cluster import SMALL_STORE, ray_cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(ppo_ray: CommandLine) -> Iterator[Cluster]:
    """Start a head that takes no actors."""
    with ray_cluster(ppo_ray.environment, head_cpus=0) as cluster:
        yield cluster


def add_node(cluster: Cluster):
    return cluster.add_node(num_cpus=2, object_store_memory=SMALL_STORE)


def on_node(ppo_ray: CommandLine, node) -> set[str]:
    """Return the names of the actors that run on a node: the children of its raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    return {name for name, process in ppo_ray.workers().items() if psutil.Process(process.pid).ppid() == raylet}


def wait_for_more(process: subprocess.Popen[str], run: Path) -> None:
    wait_for_steps(process, run, len(lines(run)) + 2)


@pytest.mark.timeout(600)
def test_one_node_after_the_other(
    ppo_ray: CommandLine, cluster: Cluster, tmp_path: Path, same_as_undisturbed: Same
) -> None:
    run = tmp_path / "run"
    first, second = add_node(cluster), add_node(cluster)
    options = ("rollout.engine=hf", f"steps={STEPS['hf']}", *OPTIONS, f"ray.address={cluster.address}")
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    wait_for_more(process, run)
    lost = on_node(ppo_ray, first)
    cluster.remove_node(first, allow_graceful=False)  # the second one has room for all
    wait_for_more(process, run)
    assert len(on_node(ppo_ray, second)) == 4
    lost |= on_node(ppo_ray, second)
    add_node(cluster)
    cluster.remove_node(second, allow_graceful=False)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    same_as_undisturbed(run, "hf")
    replaced = {event["worker"] for event in events(run) if event["event"] == "worker_replaced"}
    assert lost == {"rollout-0", "rollout-1", "reward-0", "learner-0"}
    assert replaced == lost, output
    deadline = time.monotonic() + 30
    while ppo_ray.workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ppo_ray.workers() == {}
    assert os.path.isdir(run / "checkpoints" / "final")
