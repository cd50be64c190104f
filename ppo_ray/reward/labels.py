"""The labels of a classifier, found by name."""

from collections.abc import Mapping
from typing import Any

from ppo_ray.errors import InputError


def find_label(id2label: Mapping[int, Any], label: str, path: str) -> int:
    """Return the index of the label of that name; a model's only label, if it has no name of its own, takes any.

    Raises:
        InputError: the model has no such label; the message lists those it has.
    """
    by_name = {str(name): int(index) for index, name in id2label.items()}
    if label in by_name:
        return by_name[label]
    if list(by_name) == ["LABEL_0"]:  # a reward model with one nameless output
        return 0
    known = ", ".join(by_name) or "none"
    raise InputError(f"reward.label={label}: {path} has no such label; it has {known}")
