"""Saved models with a value head: `v_head.*` among the model's own tensors, in one safetensors file or shards."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ppo_ray.models.saving import remember_generation_config
from ppo_ray.models.tensors import catch_report, find_nonfinite, find_weights_problem, read_value_head

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
        ValueError: the files lack tensors of the model, hold others, hold them in another shape, or hold NaN.
    """
    _refuse_pickles(Path(path, kwargs.get("subfolder") or ""))
    given = (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
    dtype = next((dtype for dtype in given if dtype is not None), torch.float32)
    resize = kwargs.pop("ignore_mismatched_sizes", False)
    with catch_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            *args,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    place = {name: kwargs[name] for name in _PLACE if kwargs.get(name) is not None}
    remember_generation_config(model, path, **place)
    value_head = read_value_head(path, kwargs.get("variant"), **place)
    found["unexpected_keys"] -= value_head.keys()
    if resize:  # the caller wants them new
        found["mismatched_keys"] = set()
    if problem := find_weights_problem(model, found, path, "AutoModelForCausalLM", **place):
        raise ValueError(f"{path}: {problem}")
    if problem := find_nonfinite(model):
        raise ValueError(f"{path}: {problem}")
    _log.info("%s: %s", path, "with its value head" if value_head else "no value head was saved; it is new")
    return model, value_head


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
