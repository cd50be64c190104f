"""Loading from a folder or a hub: safetensors only, no remote code, dropout off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ppo_ray.errors import InputError


def load_causal_lm(path: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> Any:
    """Load a causal language model in eval mode (dropout is off in PPO, in training passes too).

    Attention is torch's fused one (sdpa) in every model that has it: transformers' own choice.

    Args:
        path: folder or hub name.
        dtype: torch's name of the parameters' type.
        device: where to put it.

    Returns:
        The transformers model.

    Raises:
        InputError: there is no such model, it has no safetensors weights, or it is not a causal language model.
    """
    return load_pretrained(AutoModelForCausalLM, path, dtype=dtype, device=device)


def load_pretrained(auto_class: Any, path: str, *, dtype: str, device: str | torch.device) -> Any:
    """Load a model by one of transformers' Auto classes; see `load_causal_lm`."""
    try:
        with _no_progress_bar():
            model = auto_class.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {path!r} with {auto_class.__name__}: {_first_line(error)}. Give a folder or hub "
            "name with config.json and model.safetensors; `ppo-ray assets imdb` makes the offline models."
        ) from error
    return model.to(device).eval()


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer that lies with a model.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load a tokenizer from {path!r}: {_first_line(error)}. It must lie in the model's folder "
            "(tokenizer.json)."
        ) from error


def default_device() -> torch.device:
    """Return the GPU this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
