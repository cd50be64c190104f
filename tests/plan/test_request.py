"""What Ray is asked for, apart and colocated."""

from typing import Any

import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.plan import ActorSpec, ClusterShape, make_request
from ppo_ray.plan.assign import assign
from ppo_ray.plan.request import Bundle, BundleGroup, Seat

REQUIRED = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r", "rollout.batch_size=64"]
FOUR_ENGINES = ["rollout.workers=4", "rollout.gpus=1", "rollout.tensor_parallel=2", "learner.gpus=1"]


def configured(*overrides: str) -> Config:
    return load_config(None, [*REQUIRED, *overrides])


def seats(*overrides: str, **kinds: Any) -> dict[str, Seat]:
    return {seat.actor: seat for seat in make_request(configured(*overrides), **kinds).seats}


def test_phases_share_the_cores() -> None:
    """Two cores hold two workers of one thread, one of two and a learner of two: they take turns."""
    request = make_request(configured("rollout.workers=2", "reward.threads=2"))
    assert [(seat.actor, seat.cpus) for seat in request.seats] == [
        ("rollout-0", 0.3333),
        ("rollout-1", 0.3333),
        ("reward-0", 0.6666),
        ("learner-0", 0.6666),
    ]
    assert request.cpus == pytest.approx(1.9998)
    assert request.gpus == 0


def test_a_learner_that_works_beside_the_others_shares_no_core() -> None:
    request = make_request(configured("rollout.max_staleness=1", "ppo.importance_cap=2", "learner.threads=1"))
    assert [seat.cpus for seat in request.seats] == [0.5, 0.5, 1.0]


def test_apart_each_engine_has_a_group_and_the_learner_one() -> None:
    request = make_request(configured(*FOUR_ENGINES, "learner.workers=3", "learner.threads=3", "reward.workers=2"))
    engine = (Bundle(0.3333, 1.0),) * 2
    assert request.groups == (
        *(BundleGroup(f"rollout-{index}", "STRICT_PACK", engine) for index in range(4)),
        BundleGroup("learner", "PACK", (Bundle(1.0, 1.0),) * 3),
    )
    assert request.seat("rollout-2") == Seat("rollout-2", 0.3333, 1.0, "rollout-2", (0, 1))
    assert request.seat("learner-2") == Seat("learner-2", 1.0, 1.0, "learner", (2,))
    assert request.seat("reward-1") == Seat("reward-1", 0.3333, 0.0)
    assert request.gpus == 11
    assert request.cpus == pytest.approx(8 * 0.3333 + 3 + 2 * 0.3333)


def test_the_ranks_that_shard_a_copy_have_a_group_of_their_own() -> None:
    sharding = ("learner.workers=6", "learner.sharding=fsdp2", "learner.shard_size=3", "learner.gpus=1")
    request = make_request(configured(*sharding, "rollout.gpus=1"))
    assert request.groups[1:] == tuple(
        BundleGroup(f"learner-shards-{index}", "PACK", (Bundle(0.6666, 1.0),) * 3) for index in range(2)
    )
    assert request.seat("learner-4") == Seat("learner-4", 0.6666, 1.0, "learner-shards-1", (1,))
    places = assign(request, ClusterShape.uniform(2, 16, 4, 64 << 30)).places
    assert [places[f"learner-{rank}"][0].node for rank in range(6)] == [0, 0, 0, 1, 1, 1]  # packed, four and two
    assert make_request(configured(*sharding, "learner.shard_size=6", "rollout.gpus=1")).groups[1].name == "learner"


def test_colocated_all_share_the_bundles_of_the_engines() -> None:
    """Two engines of two ranks, three learner ranks and three rewards on four GPUs."""
    options = (
        "rollout.workers=2",
        "rollout.gpus=1",
        "rollout.tensor_parallel=2",
        "learner.gpus=1",
        "learner.workers=3",
    )
    request = make_request(configured(*options, "reward.workers=3", "reward.gpus=1", "ray.placement=colocated"))
    third = 0.3333
    first, second = request.groups
    assert [bundle.gpus for bundle in first.bundles + second.bundles] == [1.0] * 4
    learner = 0.6666
    assert [bundle.cpus for bundle in first.bundles] == [
        pytest.approx(third + learner + third),  # rollout-0, learner-0, reward-0
        pytest.approx(third + learner + third),  # rollout-0, learner-1, reward-2
    ]
    assert [bundle.cpus for bundle in second.bundles] == [
        pytest.approx(third + learner + third),  # rollout-1, learner-2, reward-1
        pytest.approx(third),  # rollout-1 alone
    ]
    assert request.seat("rollout-0") == Seat("rollout-0", third, third, "rollout-0", (0, 1))
    assert request.seat("rollout-1") == Seat("rollout-1", third, third, "rollout-1", (0, 1))
    assert request.seat("learner-2") == Seat("learner-2", learner, third, "rollout-1", (0,))
    assert request.seat("reward-1") == Seat("reward-1", third, third, "rollout-1", (0,))
    assert request.seat("reward-2") == Seat("reward-2", third, third, "rollout-0", (1,))
    assert request.gpus == 4


def test_colocated_rewards_without_gpus_are_spread_and_take_no_share() -> None:
    found = seats("rollout.gpus=1", "learner.gpus=1", "ray.placement=colocated")
    assert found["rollout-0"].gpus == found["learner-0"].gpus == 0.5
    assert found["learner-0"].group == "rollout-0"
    assert found["reward-0"] == Seat("reward-0", 0.3333, 0.0)


def test_an_evaluation_asks_for_no_learner() -> None:
    assert set(seats(kinds=["rollout", "reward"])) == {"rollout-0", "reward-0"}
    assert set(seats("ray.placement=colocated", kinds=["rollout", "reward"])) == {"rollout-0", "reward-0"}


def test_a_worker_of_several_ranks_counts_whole() -> None:
    spec = ActorSpec("rollout", workers=2, threads=3, gpus=4.0, ranks=4)
    assert (spec.num_cpus, spec.rank_cpus) == (4.0, 1.0)
    assert ActorSpec("learner", workers=1, threads=3, gpus=0, turns=2).num_cpus == 1.5


def test_an_actor_is_told_its_threads_and_sees_only_its_gpus() -> None:
    options: Any = ActorSpec("learner", 1, 3, 0).options("learner-0")
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert options["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""
    with_gpu: Any = ActorSpec("learner", 1, 3, 1.0).options("x")
    assert "CUDA_VISIBLE_DEVICES" not in with_gpu["runtime_env"]["env_vars"]
    assert (options["max_restarts"], options["max_task_retries"]) == (0, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.tensor_parallel=2"], "2 ranks need rollout.engine=vllm and rollout.gpus=1"),
        (["rollout.tensor_parallel=2", "rollout.gpus=1", "rollout.engine=hf"], "2 ranks need rollout.engine=vllm"),
        (["rollout.tensor_parallel=2", "rollout.gpus=0.5"], "2 ranks need rollout.engine=vllm"),
        (["learner.gpus=1.5"], "learner.gpus: 1.5 is more than one GPU and not a whole number"),
        (["ray.placement=colocated", "rollout.gpus=1"], "set rollout.gpus and learner.gpus to 1 both"),
        (["ray.placement=colocated", "rollout.gpus=2", "learner.gpus=1"], "set rollout.gpus and learner.gpus to 1"),
        (["ray.placement=colocated", "learner.workers=2"], "2 ranks need as many of rollout.workers=1 x"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configured(*overrides)
