import pytest

from ppo_ray.errors import WorkerError
from ppo_ray.weights.acks import PublishedWeights, WeightAck, check_acks


@pytest.mark.parametrize(("version", "checksum"), [(6, "aa"), (7, "bb")])
def test_a_wrong_acknowledgement_names_the_worker(version: int, checksum: str) -> None:
    sent, good = PublishedWeights(7, "aa", None), WeightAck("rollout-0", 7, "aa", 0.1)
    check_acks(sent, [good])
    with pytest.raises(WorkerError, match=r"rollout-1 serves policy version .* version 7 \(checksum aa\)"):
        check_acks(sent, [good, WeightAck("rollout-1", version, checksum, 0.1)])
