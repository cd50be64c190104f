"""Actors on a cluster of three nodes with GPUs that are but numbers: where they are is where the plan says."""

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pytest
import ray
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from ppo_ray.actors.placement import read_cluster, reserve
from ppo_ray.actors.watch import Member
from ppo_ray.cli import app
from ppo_ray.config import Config, load_config, to_yaml
from ppo_ray.errors import InputError, WorkerLost
from ppo_ray.learner.group import LearnerGroup
from ppo_ray.plan import ActorSpec, make_request
from ppo_ray.plan.assign import assign
from ppo_ray.plan.demand import KINDS
from ppo_ray.reward.group import RewardGroup
from ppo_ray.rollout.group import RolloutGroup

pytestmark = pytest.mark.slow

Places = dict[str, tuple[str, tuple[int, ...]]]
"""The id of each actor's node, and the GPUs that Ray gave the actor."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a head that takes no actors, and three nodes."""
    folder = tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True)
    with folder as short, pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        Path(short, "ray").mkdir()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
        try:
            for _ in range(3):
                cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=100 << 20)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def configured(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path: Path) -> Callable[..., Config]:
    base = (f"model.path={tiny_policy}", f"reward.path={tiny_classifier}", f"prompts.path={tiny_prompts}")
    base += (f"output_dir={tmp_path / 'run'}", "rollout.batch_size=8", "rollout.engine=hf", "rollout.workers=2")
    base += ("rollout.gpus=1", "learner.workers=2", "learner.gpus=1", "learner.threads=1", "ray.object_store_mib=100")
    return lambda *overrides: load_config(None, [*base, *overrides])


Groups = tuple[RolloutGroup, RewardGroup, LearnerGroup]


def without_imports(make: Callable[[Config], ActorSpec], config: Config) -> ActorSpec:
    return replace(make(config), modules=())


@contextlib.contextmanager
def launched(config: Config, folder: Path) -> Iterator[Groups]:
    """Launch all actors as a run does, but for what they would import and load: it is not of interest here."""
    with pytest.MonkeyPatch.context() as patch, reserve(config) as seats, contextlib.ExitStack() as stack:
        for kind in KINDS:
            name = f"ppo_ray.{kind}.group.{kind}_spec"
            patch.setattr(name, partial(without_imports, resolve_name(name)))
        groups = (
            RolloutGroup(config, print, seats),
            RewardGroup(config, print, seats),
            LearnerGroup(config, folder, print, seats),
        )
        for group in groups:
            stack.callback(group.close)
        yield groups


def members(*groups: RolloutGroup | RewardGroup | LearnerGroup) -> list[Member]:
    return [member for group in groups for member in group._group.members]


def places(found: list[Member]) -> Places:
    def ask(actor: object) -> tuple[str, tuple[int, ...]]:
        return ray.get_runtime_context().get_node_id(), tuple(int(gpu) for gpu in ray.get_gpu_ids())

    answers = ray.get([member.handle.__ray_call__.remote(ask) for member in found], timeout=120)
    return dict(zip([member.name for member in found], answers, strict=True))


def together(where: dict[str, tuple[object, tuple[int, ...]]]) -> set[frozenset[str]]:
    """Return who is on a node with whom; which node that is, Ray may choose among like ones."""
    nodes: dict[object, set[str]] = {}
    for actor, (node, _) in where.items():
        nodes.setdefault(node, set()).add(actor)
    return {frozenset(actors) for actors in nodes.values()}


def really(found: Places, kinds: str) -> dict[str, tuple[object, tuple[int, ...]]]:
    return {name: place for name, place in found.items() if name.startswith(tuple(kinds.split()))}


def planned(config: Config, kinds: str) -> dict[str, tuple[object, tuple[int, ...]]]:
    found = assign(make_request(config), read_cluster()).places
    return {name: (place.node, place.gpus) for name, (place,) in found.items() if name.startswith(tuple(kinds.split()))}


def free() -> tuple[float, float]:
    resources = ray.available_resources()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def wait_until_all_is_free() -> None:
    deadline = time.monotonic() + 30
    while free() != (6.0, 6.0) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert free() == (6.0, 6.0)


def test_actors_are_where_the_plan_says(cluster: Cluster, configured: Callable[..., Config], tmp_path: Path) -> None:
    apart = configured("reward.workers=3")
    with launched(apart, tmp_path) as groups:
        found = places(members(*groups))
        assert together(really(found, "rollout learner")) == together(planned(apart, "rollout learner"))
        assert len({node for node, _ in really(found, "learner").values()}) == 1
        assert len({node for node, _ in really(found, "reward").values()}) == 3
        used = Counter((node, gpu) for node, gpus in found.values() for gpu in gpus)
        assert len(used) == 4 and set(used.values()) == {1}  # engines and ranks, each with a GPU of its own
    wait_until_all_is_free()

    shared = configured("reward.workers=2", "reward.gpus=1", "ray.placement=colocated")
    with launched(shared, tmp_path) as groups:
        found = places(members(*groups))
        assert together(really(found, "r l")) == together(planned(shared, "r l"))
        for index in (0, 1):
            trio = {really(found, "r l")[f"{kind}-{index}"] for kind in ("rollout", "learner", "reward")}
            assert len(trio) == 1 and len(trio.pop()[1]) == 1  # on the very same GPU
        assert free()[1] == 4.0
        learner = groups[2]
        before = [member.handle for member in members(learner)]
        learner._group.launch_again(WorkerLost("killed by the test", "learner-1"))
        again = places(members(learner))
        assert really(again, "l") == really(found, "l")
        assert not set(before) & {member.handle for member in members(learner)}
    wait_until_all_is_free()

    too_many = configured("learner.workers=7")
    supply = r"9 GPUs needed, the cluster has 6(?s:.*)2 CPUs, 2 free, 2 GPUs, 2 free"
    with pytest.raises(InputError, match=supply), reserve(too_many):
        pass
    began = time.monotonic()
    with reserve(configured()):  # another's run leaves two GPUs of six
        pressed = configured("ray.start_timeout_s=2")
        with pytest.raises(InputError, match="no room for the actors within 2 s") as caught, reserve(pressed):
            pass
        assert time.monotonic() - began < 60
        assert "rollout-0 wants 1 x (0.3333 CPUs, 1 GPUs); rollout-1 wants" in str(caught.value)
        assert "2 GPUs, 0 free" in str(caught.value)
    wait_until_all_is_free()

    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(shared))
    result = CliRunner().invoke(app, ["plan", str(path), "--address", cluster.address], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    names = {node.name for node in read_cluster().nodes}
    assert len(names) == 4 and all(name in result.output for name in names)
