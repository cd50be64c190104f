"""Saved models with a value head: `v_head.*` among the model's own tensors, in one safetensors file or shards."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

VALUE_HEAD = "v_head."
"""Prefix of the names of a value head's tensors."""
_PLACE = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
_CONVERT = (
    "import glob, torch, safetensors.torch; "
    "tensors = {name: tensor.contiguous().clone() for file in sorted(glob.glob('pytorch_model*.bin')) "
    "for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}; "
    "safetensors.torch.save_file(tensors, 'model.safetensors', {'format': 'pt'})"
)

_log = logging.getLogger(__name__)


def load_with_value_head(path: str, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Load a causal LM and the value head saved with it; only safetensors, and no code of its folder.

    Args:
        path: folder or hub name.
        *args: for `AutoModelForCausalLM.from_pretrained`.
        **kwargs: likewise. The type of the weights is float32 if they say nothing, as under TRL 0.11; transformers 5
            would take that of the file.

    Returns:
        The model, and the `v_head.*` tensors; none of them if none were saved.

    Raises:
        OSError: there is no such model, or it has no safetensors weights.
    """
    _refuse_pickles(Path(path, kwargs.get("subfolder") or ""))
    given = (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
    dtype = next((dtype for dtype in given if dtype is not None), torch.float32)
    with _silence_report():
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            *args,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **kwargs,
        )
    superfluous = {name for name in report["unexpected_keys"] if not name.startswith(VALUE_HEAD)}
    if report["missing_keys"] or superfluous:
        _log.warning(
            "%s: not in the file and new: %s; in the file and not used: %s",
            path,
            sorted(report["missing_keys"]) or "nothing",
            sorted(superfluous) or "nothing",
        )
    place = {name: kwargs[name] for name in _PLACE if kwargs.get(name) is not None}
    value_head = _read_value_head(path, kwargs.get("variant"), place)
    _log.info("%s: %s", path, "with its value head" if value_head else "no value head was saved; it is new")
    return model, value_head


def _read_value_head(path: str, variant: str | None, place: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the `v_head.*` tensors from the file or shards that transformers takes, which prefers the single file."""
    quiet = {"_raise_exceptions_for_missing_entries": False}

    def add_variant(name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        return f"{stem}.{variant}.{suffix}" if variant else name

    whole = cached_file(path, add_variant("model.safetensors"), **quiet, **place)
    files = [whole]
    if whole is None:
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


def _refuse_pickles(folder: Path) -> None:
    """Refuse a local model that has pickled weights only, and say how to convert it.

    Raises:
        OSError: it has pickled weights only.
    """
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled and not list(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder} has its weights in {pickled[0].name} only, a pickle, which can run code when it is read; only "
            f'safetensors are loaded. If you trust the file, convert it once, in that folder: python -c "{_CONVERT}"'
        )


@contextmanager
def _silence_report() -> Iterator[None]:
    """Keep transformers from reporting the value head as unexpected; `load_with_value_head` logs what else is wrong."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
