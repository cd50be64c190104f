import pytest
import ray

from ppo_ray.actors.placement import ActorSpec, check_fit
from ppo_ray.errors import InputError


def test_phases_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores hold two workers of one thread, one of two and a learner of two: they take turns."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    specs = [ActorSpec("rollout", 2, 1, 0), ActorSpec("reward", 1, 2, 0), ActorSpec("learner", 1, 2, 0)]
    assert [spec.num_cpus for spec in specs] == [0.3333, 0.6666, 0.6666]
    check_fit(specs)


@pytest.mark.parametrize(
    ("supply", "message"),
    [({"CPU": 64.0}, "need 5 GPUs but Ray has 0"), ({"CPU": 64.0, "GPU": 4.0}, r"rollout: 4 x 1 .*learner: 1 x 1")],
)
def test_what_cannot_fit_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, supply: dict[str, float], message: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: supply)
    with pytest.raises(InputError, match=message):
        check_fit([ActorSpec("rollout", 4, 8, 1.0), ActorSpec("learner", 1, 8, 1.0)])


def test_shared_gpus_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    check_fit([ActorSpec("rollout", 1, 2, 0.5), ActorSpec("reward", 1, 2, 0.1), ActorSpec("learner", 1, 2, 0.4)])


def test_an_actor_is_told_its_threads_and_sees_only_its_gpus() -> None:
    options = ActorSpec("learner", 1, 3, 0).options("learner-0")
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert options["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in ActorSpec("learner", 1, 3, 1.0).options("x")["runtime_env"]["env_vars"]
    assert (options["max_restarts"], options["max_task_retries"]) == (0, 0)
