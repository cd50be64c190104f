"""What waiting costs."""

from collections.abc import Sequence

import pytest

from ppo_ray.actors import watch as watching
from ppo_ray.actors.watch import Limits, Member, watch


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
    ray = Answered()
    monkeypatch.setattr(watching.ray, "wait", ray.wait)
    monkeypatch.setattr(watching.ray, "get", ray.get)
    watch({ref: Member(f"toy-{ref}", None) for ref in range(workers)}, Limits(60, 60), "waiting")
    assert ray.shown <= 3 * workers
