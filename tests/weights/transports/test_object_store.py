from typing import Any

import numpy as np
import pytest

from ppo_ray.weights import transports
from ppo_ray.weights.transports import RemoteBuckets


class Store:
    """What stands for Ray: references are indices of buckets."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def wait(self, references: list[int], num_returns: int, timeout: float) -> None:
        self.log.append(("pull", *references, num_returns, timeout))

    def get(self, reference: int, timeout: float) -> np.ndarray:
        self.log.append(("get", reference, timeout))
        return np.full(3, reference, np.uint8)


def test_buckets_are_on_their_way_at_once_and_fetched_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(transports, "ray", store)
    buckets = RemoteBuckets([7, 8], 5.0)
    assert store.log == [("pull", 7, 8, 2, 0)]
    assert len(buckets) == 2
    assert buckets[1].tolist() == [8, 8, 8]
    assert store.log[1:] == [("get", 8, 5.0)]
    assert [bucket[0] for bucket in buckets] == [7, 8]
    assert len(RemoteBuckets([], 5.0)) == 0
