import pytest

from ppo_ray import trajectory
from ppo_ray.errors import WorkerError
from ppo_ray.staleness import check_staleness
from tests.test_trajectory import row


def make(*versions: int):
    workers = enumerate(versions)
    return trajectory.from_rows([row(10 + i, policy_version=version, worker=f"rollout-{i}") for i, version in workers])


def test_figures() -> None:
    assert check_staleness(make(3, 3), 3, 0) == {"rollout/staleness_mean": 0, "rollout/staleness_max": 0}
    assert check_staleness(make(3, 2, 2, 2), 3, 1) == {"rollout/staleness_mean": 0.75, "rollout/staleness_max": 1}


@pytest.mark.parametrize(("versions", "policy", "limit"), [((3, 2), 3, 0), ((3, 1), 3, 1), ((3, 4), 3, 1)])
def test_what_is_too_stale_or_not_yet_learnt_is_refused_by_name(versions, policy: int, limit: int) -> None:
    message = (
        f"rollout-1 sampled the trajectory of sample 11 with policy version {versions[1]}, but the learner is at "
        f"version {policy} and takes those of version {policy - limit} or later .rollout.max_staleness={limit}.; 1 of 2"
    )
    with pytest.raises(WorkerError, match=message):
        check_staleness(make(*versions), policy, limit)
