"""The tensors of a model's files, held against those of the model: what is missing, left over, or of another shape."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers.utils import cached_file

A_NAME, B_NAME = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of adapters (LoRA) that travel alone; before them stands the name of their linear map."""
VALUE_HEAD = "v_head."
"""Prefix of the names of a value head's tensors that lie among a model's own, as TRL's and `ppo_ray.trl`'s do."""
_HEADS = "v_head value_head v_proj_head score classifier classification_head regression_head reward_head lm_head"
_HEAD = re.compile(rf"(^|\.)({_HEADS.replace(' ', '|')})\.")
_PRETRAINING = re.compile(
    r"(^|\.)(pooler|lm_head|cls|lm_predictions|vocab_\w+|discriminator_predictions|generator_\w+)\."
)
"""Tensors of the task that a classifier was pre-trained on, which often lie in its files and are no part of it."""
_NO_WEIGHTS = re.compile(r"\.masked_bias$")
"""Constants that older versions of transformers wrote beside the weights."""


@contextmanager
def catch_report() -> Iterator[list[str]]:
    """Keep transformers from logging what is wrong with a model's tensors, and yield the list that it goes to."""
    reports: list[str] = []

    def catch(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            reports.append(record.getMessage())
        return not is_report

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(catch)
    try:
        yield reports
    finally:
        logger.removeFilter(catch)


def find_weights_problem(model: Any, found: dict[str, Any], path: str, auto_class: str, **place: Any) -> str | None:
    """Say which tensors a model's files lack, hold besides, or hold in another shape; None: they are the model's own.

    Args:
        model: that was loaded.
        found: transformers' `output_loading_info`.
        path: where it was loaded from.
        auto_class: name of the Auto class that loaded it. `AutoModel` leaves the head of the files' model out, and a
            classifier what it was pre-trained with.
        **place: where else to look, for transformers' `cached_file`.
    """
    missing = set(found["missing_keys"])
    wrong = {f"{name} ({list(theirs)}, by config.json {list(ours)})" for name, theirs, ours in found["mismatched_keys"]}
    unused = {name for name in found["unexpected_keys"] if not _is_left_out(name, model, auto_class)}
    if "Sequence" not in auto_class and any(name.startswith(VALUE_HEAD) for name in unused):
        unused -= read_value_head(path, **place).keys()
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    untied = set(expand(all_submodels=True)) - set(model.all_tied_weights_keys) if expand else set()
    problems = [
        f"{words} {list_names(names)}"
        for words, names in (
            ("its files lack", missing),
            ("its files hold, and the model has no place for,", unused),
            ("tensors of another shape:", wrong),
            ("config.json ties (tie_word_embeddings), and the files hold of its own,", untied),
        )
        if names
    ]
    if missing and (heads := [name for name in unused if _HEAD.search(name)]):
        problems.append(f"{list_names(heads)} may be what the model calls {list_names(missing)}: rename it in the file")
    return "; ".join(problems) or None


def find_nonfinite(model: Any) -> str | None:
    """Say which weights of a model are NaN or infinite, or None."""
    broken = [name for name, tensor in model.named_parameters() if not _is_finite(tensor)]
    return f"has NaN or infinite weights: {list_names(broken)}; its files are damaged" if broken else None


def _is_finite(tensor: torch.Tensor) -> bool:
    """Say whether a tensor has no NaN and no infinity; its sum, which is quick, is asked first."""
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _is_left_out(name: str, model: Any, auto_class: str) -> bool:
    """Say whether a tensor that a model has no place for is rightly left out."""
    if _NO_WEIGHTS.search(name):
        return True
    if auto_class == "AutoModel" and not name.startswith(VALUE_HEAD):  # beside the decoder: another model's head
        children = {child for child, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
        return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] not in children
    return "Sequence" in auto_class and _PRETRAINING.search(name) is not None


def read_value_head(path: str, variant: str | None = None, **place: Any) -> dict[str, torch.Tensor]:
    """Read the `v_head.*` tensors from the safetensors files that transformers takes: the single one, or the shards.

    Args:
        path: folder or hub name.
        variant: of the files' names.
        **place: where else to look, for transformers' `cached_file`.

    Returns:
        Tensors by their names in the file; none if there is no value head.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False}

    def add_variant(name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        return f"{stem}.{variant}.{suffix}" if variant else name

    files = [cached_file(path, add_variant("model.safetensors"), **quiet, **place)]
    if files == [None]:
        index = cached_file(path, add_variant("model.safetensors.index.json"), **quiet, **place)
        shards = json.loads(Path(index).read_text())["weight_map"] if index is not None else {}
        names = {file for name, file in shards.items() if name.startswith(VALUE_HEAD)}
        files = [cached_file(path, name, **place) for name in sorted(names)]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as tensors:
            heads = [name for name in tensors.keys() if name.startswith(VALUE_HEAD)]  # noqa: SIM118
            found |= {name: tensors.get_tensor(name) for name in heads}
    return found


def list_names(names: Iterable[str]) -> str:
    """List the first of some names."""
    first, *rest = sorted(names)
    shown = ", ".join([first, *rest[:2]])
    return f"{shown} and {len(rest) - 2} more" if len(rest) > 2 else shown
