"""Which output of a classifier is meant."""

import pytest

from ppo_ray.errors import InputError
from ppo_ray.reward.labels import find_label


def test_a_label_is_found_by_its_name() -> None:
    assert find_label({0: "POSITIVE", 1: "NEGATIVE"}, "NEGATIVE", "m") == 1


def test_a_nameless_only_label_is_the_one_meant() -> None:
    assert find_label({0: "LABEL_0"}, "POSITIVE", "m") == 0


@pytest.mark.parametrize(
    ("labels", "known"), [({0: "TOXIC"}, "TOXIC"), ({0: "LABEL_0", 1: "LABEL_1"}, "LABEL_0, LABEL_1"), ({}, "none")]
)
def test_what_there_is_instead_is_said(labels: dict[int, str], known: str) -> None:
    with pytest.raises(InputError, match=f"reward.label=POSITIVE: some/model has no such label; it has {known}"):
        find_label(labels, "POSITIVE", "some/model")
