"""What waiting costs."""

from collections.abc import Sequence

import pytest
import ray

from ppo_ray.actors import watch as watching
from ppo_ray.actors.watch import Limits, Member, watch
from ppo_ray.actors.worker import Worker


class Answered:
    """Stands in for Ray: every answer is there; counts the references it is shown."""

    def __init__(self) -> None:
        self.shown = 0

    def wait(self, refs: Sequence[int], num_returns: int, **options: object) -> tuple[list[int], list[int]]:
        self.shown += len(refs)
        return list(refs[:num_returns]), list(refs[num_returns:])

    def get(self, refs: Sequence[int], **options: object) -> list[int]:
        self.shown += len(refs)
        return list(refs)


@pytest.mark.parametrize("workers", [1, 1000])
def test_a_thousand_answers_are_not_looked_at_a_thousand_times(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    answers = Answered()
    monkeypatch.setattr(watching.ray, "wait", answers.wait)
    monkeypatch.setattr(watching.ray, "get", answers.get)
    watch({ref: Member(f"toy-{ref}", None) for ref in range(workers)}, Limits(60, 60), "waiting")
    assert answers.shown <= 3 * workers


def test_where_an_actor_runs_is_told_whatever_its_gpus_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray names GPUs by numbers, or by what CUDA_VISIBLE_DEVICES has: UUIDs, and names of MIG."""
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1/0"])
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    assert Worker("rollout-0").whereabouts().node == "10.0.0.7"
