"""Loading of models and tokenizers from a folder or a hub.

Dropout is off. Pickled weights and a model's own code are refused unless the config trusts them. Every tensor that a
model needs comes from its files, and all that its files hold is used: transformers alone would draw what is missing.
"""

import os
import pickle
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ppo_ray.config import NO_TRUST, Quantization, Trust, revision_problem
from ppo_ray.errors import InputError, first_line
from ppo_ray.models.quantization import quantize
from ppo_ray.models.saving import remember_generation_config
from ppo_ray.models.tensors import catch_report, find_nonfinite, find_weights_problem, list_names

_DRIVER = Path("/proc/driver/nvidia/version")


def load_causal_lm(
    path: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust: Trust = NO_TRUST,
    quantization: Quantization | None = None,
) -> Any:
    """Load a causal language model in eval mode: PPO runs without dropout, in training passes too.

    Attention is torch's fused one (sdpa) in every model that has it: transformers' own choice.

    Args:
        path: folder or hub name.
        dtype: torch's name of the parameters' type.
        device: where to put it.
        trust: which revision, and what its files may do; even pickles that are allowed may hold nothing but tensors.
        quantization: what its linear maps get instead of weights; see `quantize`. None: they keep their weights.

    Returns:
        The transformers model.

    Raises:
        InputError: there is no such model, it is not a causal language model, or its weights are damaged or not
            trusted.
    """
    how: Any = {"dtype": dtype, "device": device, "trust": trust, "quantization": quantization}
    return load_pretrained(AutoModelForCausalLM, path, **how)


def load_pretrained(
    auto_class: Any,
    path: str,
    *,
    dtype: str,
    device: str | torch.device,
    trust: Trust = NO_TRUST,
    quantization: Quantization | None = None,
) -> Any:
    """Load a model by one of transformers' Auto classes; see `load_causal_lm`."""
    model = _read(auto_class, path, trust, dtype=getattr(torch, dtype)).to("cpu" if quantization else device).eval()
    if problem := find_nonfinite(model):
        raise InputError(f"the model {path!r} {problem}")
    if quantization:
        quantize(model, quantization, torch.device(device))
    return model


def check_weights(key: str, auto_class: str, path: str, trust: Trust) -> tuple[Any, str | None]:
    """Hold the names and shapes of a model's tensors against its config, without reading the weights.

    Args:
        key: the option that names the model.
        auto_class: name of one of transformers' Auto classes.
        path: folder or hub name. What is not on this machine yet is not fetched: its worker checks it as it loads it.
        trust: which revision, and what its files may do.

    Returns:
        The model on the meta device, or None; and what is wrong with it, or None.
    """
    local = Path(path).is_dir()
    try:
        loader = getattr(transformers, auto_class)
        return _read(loader, path, trust, device_map="meta", local_files_only=not local), None
    except InputError as error:
        return None, f"{key}={path}: {error}" if local else None


def _read(auto_class: Any, path: str, trust: Trust, **options: Any) -> Any:
    """Load a model whose files hold exactly its tensors.

    Raises:
        InputError: it cannot be loaded, or they do not.
    """
    if problem := revision_problem(path, trust.revision):
        raise InputError(f"cannot load the model {path!r}: {problem}")
    try:
        with _hide_progress_bar(), catch_report() as reports:
            model, found = auto_class.from_pretrained(
                path,
                use_safetensors=None if trust.pickles else True,
                weights_only=True,
                trust_remote_code=trust.remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
                **trust.place,
                **options,
            )
    except Exception as error:  # transformers, safetensors, pickle and a model's own code: each has errors of its own
        raise InputError(
            f"cannot load the model {path!r} with {auto_class.__name__}: {_explain(error, reports)}. Give a folder or "
            "hub name with config.json and model.safetensors; `ppo-ray assets imdb` makes the offline models."
            + _name_refused_options(trust)
        ) from error
    remember_generation_config(model, path, **trust.place)
    if problem := find_weights_problem(model, found, path, auto_class.__name__, **trust.place):
        raise InputError(f"cannot load the model {path!r} with {auto_class.__name__}: {problem}")
    return model


def load_tokenizer(path: str, trust: Trust = NO_TRUST) -> Any:
    """Load the tokenizer in a model's folder.

    Its own code is not run unless it is trusted. For some models transformers then silently makes a tokenizer of the
    other files, which may be another one: `preflight` refuses that.

    Raises:
        InputError: there is none, or it is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust.remote_code, **trust.place)
    except Exception as error:  # the tokenizers library raises no narrower kind
        raise InputError(
            f"cannot load a tokenizer from {path!r}: {_explain(error)}. It must lie in the model's folder "
            "(tokenizer.json)." + _name_refused_options(trust)
        ) from error


def cast(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Change a parameter's type in place. Leave buffers alone: rotary frequencies need float32."""
    parameter.data = parameter.data.to(dtype)


def default_device() -> torch.device:
    """Return the GPU this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_gpu(key: str, gpus: float) -> None:
    """Refuse to compute on the CPU where a GPU was asked for.

    Args:
        key: the option that asks for it, e.g. `rollout.gpus`.
        gpus: how many, or which part of one; 0: none is asked for.

    Raises:
        InputError: torch finds no GPU in this process. `PPO_RAY_GPUS_ARE_NUMBERS=1` in its environment, for tests of
            placement, says that Ray only counts them.
    """
    if not gpus or torch.cuda.is_available() or os.environ.get("PPO_RAY_GPUS_ARE_NUMBERS") == "1":
        return
    try:
        torch.cuda.init()
        reason = "it sees no device"
    except (AssertionError, RuntimeError) as error:  # not built for CUDA; no driver, or one that is too old
        reason = first_line(error).rstrip(".")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    found = re.search(r"Module +([\d.]+)", _DRIVER.read_text()) if _DRIVER.is_file() else None
    driver = (
        f"its NVIDIA driver is {found.group(1) if found else 'of an unknown version'}"
        if _DRIVER.is_file()
        else ("it has no NVIDIA driver")
    )
    raise InputError(
        f"{key}={gpus:g}, but torch {torch.__version__} ({built}) finds no GPU on node {platform.node()}: {reason}; "
        f"{driver}. Install the packages for GPUs (`make setup EXTRA=gpu`; CUDA 13 needs driver 580 or newer), or set "
        f"{key}=0 to compute on the CPU"
    )


@contextmanager
def _hide_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _explain(error: Exception, reports: Iterable[str] = ()) -> str:
    """Give the reason of a failed load in one line."""
    if failed := re.findall(r"^(\S+) +\|[^|]*CONVERSION", "\n".join(reports), re.MULTILINE):
        return f"tensors that {list_names(set(failed))} is made of are missing or of another shape"
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to load it all the same
        return "its pickled weights are damaged or hold more than tensors"
    line = first_line(error).rstrip(".") if str(error).strip() else ""
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"


def _name_refused_options(trust: Trust) -> str:
    """Name the options that would allow what was not tried."""
    refused = {"trust_remote_code (its own Python code)": trust.remote_code}
    refused |= {"allow_pickled_weights (.bin)": trust.pickles}
    names = " and ".join(name for name, allowed in refused.items() if not allowed)
    return f" Only for models you trust there are {names}." if names else ""
