"""What Ray is asked for, by name: options of actors, and what is refused at once."""

from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ppo_ray.actors import placement
from ppo_ray.actors.placement import Seats, check_fit
from ppo_ray.errors import InputError
from ppo_ray.plan import make_request
from ppo_ray.rollout.group import rollout_spec
from tests.plan.test_request import configured


def node(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": name * 8, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True, "Resources": resources}


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand in for a connected cluster."""

    def connect(*nodes: dict[str, Any], may_grow_to: dict[str, int] | None = None) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: [*nodes, node("9", CPU=99, GPU=99) | {"Alive": False}])
        monkeypatch.setattr(placement, "available_resources_per_node", lambda: {"2" * 8: {"CPU": 1.5}})
        monkeypatch.setattr(placement.state, "get_max_resources_from_cluster_config", lambda: may_grow_to)

    return connect


def test_what_cannot_fit_is_refused_with_the_numbers(connected: Any) -> None:
    request = make_request(configured("rollout.workers=4", "rollout.gpus=1", "learner.gpus=1"))
    connected(node("1", CPU=32, GPU=3), node("2", CPU=32, GPU=2))
    check_fit(request)
    connected(node("1", CPU=32, GPU=2), node("2", CPU=32, GPU=2))
    with pytest.raises(InputError) as caught:
        check_fit(request)
    assert "(rollout: 4 x 1, reward: 1 x 0, learner: 1 x 1): 5 GPUs needed, the cluster has 4" in str(caught.value)
    assert "node 10.0.0.2 (222222): 32 CPUs, 1.5 free, 2 GPUs, 0 free" in str(caught.value)


def test_a_cluster_that_grows_is_waited_for(connected: Any) -> None:
    connected(node("1", CPU=2), may_grow_to={"CPU": 64, "GPU": 8})
    check_fit(make_request(configured("rollout.gpus=1")))


def test_an_actor_and_its_successors_are_sent_to_their_bundle() -> None:
    request = make_request(
        configured("rollout.gpus=1", "rollout.tensor_parallel=2", "learner.gpus=1", "learner.workers=2")
    )
    groups = {group.name: PlacementGroup.empty() for group in request.groups}
    seats = Seats({seat.actor: seat for seat in request.seats}, groups)
    learner = seats.options("learner-1")
    strategy = learner["scheduling_strategy"]
    assert isinstance(strategy, PlacementGroupSchedulingStrategy)
    assert strategy.placement_group is groups["learner"]
    assert (strategy.placement_group_bundle_index, learner["num_gpus"], learner["num_cpus"]) == (1, 1.0, 0.6666)
    engine = seats.options("rollout-0")  # its ranks are actors that vLLM starts
    assert (engine["num_gpus"], engine["num_cpus"]) == (0, 0.3333)
    assert engine["scheduling_strategy"].placement_group_capture_child_tasks
    assert seats.options("reward-0") == {"scheduling_strategy": "SPREAD"}
    assert Seats().options("toy-0") == {}


def test_ranks_of_an_engine_are_told_their_bundles_and_shares() -> None:
    options = ("rollout.gpus=1", "rollout.tensor_parallel=2", "learner.gpus=1")
    apart = rollout_spec(configured(*options)).environment
    assert (apart["VLLM_RAY_BUNDLE_INDICES"], apart["VLLM_RAY_PER_WORKER_GPUS"]) == ("0,1", "1")
    shared = rollout_spec(configured(*options, "learner.workers=2", "ray.placement=colocated")).environment
    assert shared["VLLM_RAY_PER_WORKER_GPUS"] == "0.5"
    assert "VLLM_RAY_BUNDLE_INDICES" not in rollout_spec(configured("rollout.gpus=1")).environment
