"""Loading from a folder or a hub: dropout off; safetensors only and no code of the model's own unless trusted."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ppo_ray.config import NO_TRUST, Trust
from ppo_ray.errors import InputError


def load_causal_lm(
    path: str, *, dtype: str = "float32", device: str | torch.device = "cpu", trust: Trust = NO_TRUST
) -> Any:
    """Load a causal language model in eval mode (dropout is off in PPO, in training passes too).

    Attention is torch's fused one (sdpa) in every model that has it: transformers' own choice.

    Args:
        path: folder or hub name.
        dtype: torch's name of the parameters' type.
        device: where to put it.
        trust: what its folder may do; even pickles that are allowed may hold nothing but tensors.

    Returns:
        The transformers model.

    Raises:
        InputError: there is no such model, its weights are damaged or none that the trust allows, or it is not a causal
            language model.
    """
    return load_pretrained(AutoModelForCausalLM, path, dtype=dtype, device=device, trust=trust)


def load_pretrained(
    auto_class: Any, path: str, *, dtype: str, device: str | torch.device, trust: Trust = NO_TRUST
) -> Any:
    """Load a model by one of transformers' Auto classes; see `load_causal_lm`."""
    try:
        with _no_progress_bar():
            model = auto_class.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                use_safetensors=None if trust.pickles else True,
                weights_only=True,
                trust_remote_code=trust.remote_code,
            )
    except Exception as error:  # transformers, safetensors, pickle and a model's own code: each has errors of its own
        raise InputError(
            f"cannot load the model {path!r} with {auto_class.__name__}: {_reason(error)}. Give a folder or hub "
            "name with config.json and model.safetensors; `ppo-ray assets imdb` makes the offline models."
            + _untrusted(trust)
        ) from error
    return model.to(device).eval()


def load_tokenizer(path: str, trust: Trust = NO_TRUST) -> Any:
    """Load the tokenizer that lies with a model.

    Code of its own is not run unless it is trusted. For some models transformers then makes what it can of the other
    files without a word, which may be another tokenizer: `preflight` refuses that.

    Raises:
        InputError: there is none, or none that the trust allows.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust.remote_code)
    except Exception as error:  # the tokenizers library raises no narrower kind
        raise InputError(
            f"cannot load a tokenizer from {path!r}: {_reason(error)}. It must lie in the model's folder "
            "(tokenizer.json)." + _untrusted(trust)
        ) from error


def load_vocab_size(path: str, trust: Trust = NO_TRUST) -> int:
    """Return how many token ids a model knows: its ids are below that.

    Raises:
        InputError: it has no config, or one of no language model.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust.remote_code)
        return int(config.get_text_config().vocab_size)
    except AttributeError as error:
        raise InputError(f"the config of {path!r} has no vocab_size; give a language model") from error
    except Exception as error:  # as in `load_pretrained`
        raise InputError(
            f"cannot load the config of the model {path!r}: {_reason(error)}.{_untrusted(trust)}"
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


def _reason(error: Exception) -> str:
    """Say in a line why something cannot be loaded."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to load it all the same
        return "its pickled weights are damaged or hold more than tensors"
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"


def _untrusted(trust: Trust) -> str:
    """Name the options that allow what was not tried."""
    refused = {"trust_remote_code (its own Python code)": trust.remote_code}
    refused |= {"allow_pickled_weights (.bin)": trust.pickles}
    names = " and ".join(name for name, allowed in refused.items() if not allowed)
    return f" Only for models you trust there are {names}." if names else ""
