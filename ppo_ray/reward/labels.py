"""What a classifier's config and tokenizer say of it, read without torch: its labels, its longest text."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ppo_ray.errors import InputError
from ppo_ray.models.support import find_positions, rope_parameters


def find_label(id2label: Mapping[int, Any], label: str, path: str) -> int:
    """Return the index of the label of that name; a model's only label, if it has no name of its own, takes any.

    Raises:
        InputError: the model has no such label, or several; the message lists those it has.
    """
    names = {int(index): str(name) for index, name in id2label.items()}
    known = ", ".join(names.values()) or "none"
    if Counter(names.values())[label] > 1:
        raise InputError(f"reward.label={label}: {path} has several labels of that name; it has {known}")
    for index, name in names.items():
        if name == label:
            return index
    if list(names.values()) == ["LABEL_0"]:  # a reward model with one nameless output
        return 0
    raise InputError(f"reward.label={label}: {path} has no such label; it has {known}")


def check_transform(transform: str, config: Any, path: str) -> None:
    """Check that the labels of a model are such that the transform means something.

    Args:
        transform: as `reward.transform`.
        config: the model's own.
        path: of the model, for the error.

    Raises:
        InputError: a softmax over one label, over labels of which several may hold, or over numbers.
    """
    if transform != "softmax":
        return
    if config.num_labels == 1:
        raise InputError(f"reward.transform=softmax is always 1 for {path!r}: it has one label; use logit or sigmoid")
    kind = getattr(config, "problem_type", None)
    if kind in ("multi_label_classification", "regression"):
        raise InputError(
            f"reward.transform=softmax: the outputs of {path!r} are not the labels of one choice (problem_type={kind} "
            "in its config); use logit or sigmoid"
        )


def classifies_text(config: Any) -> bool:
    """Say whether transformers has a sequence classifier for the config of a model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def token_limit(config: Any, tokenizer: Any) -> int | None:
    """Return the tokens of the longest text that a model takes, special tokens included; None: there is no limit.

    A model's table of positions may end a little earlier; that is known when the model is loaded.

    Args:
        config: the model's own.
        tokenizer: its own.
    """
    text = config.get_text_config()
    limits = [tokenizer.model_max_length, find_positions(config)]
    if "dynamic" in rope_types(config):  # beyond it, frequencies depend on the texts before
        limits += [rope.get("original_max_position_embeddings") for rope in rope_parameters(config)]
    if getattr(text, "attention_type", None) == "block_sparse":  # longer texts change how all later ones are computed
        limits.append((5 + 2 * text.num_random_blocks) * text.block_size)
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 2**31]  # -1 and 1e30 mean none
    return min(known, default=None)


def rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary positions that a model's config names, e.g. `{"longrope"}`."""
    return {str(rope.get("rope_type", rope.get("type"))) for rope in rope_parameters(config)}
