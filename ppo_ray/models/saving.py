"""Writing of models for `from_pretrained`: the weights of a state, and the user's generation_config.json as it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

_SOURCE = "_generation_config_source"


def remember_generation_config(model: Any, path: str, **place: Any) -> None:
    """Keep the bytes of the generation_config.json that a model is loaded with: its folder may go before it is saved.

    Args:
        model: that was loaded.
        path: folder or hub name.
        **place: where else to look, for transformers' `cached_file`.
    """
    file = cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **place)
    if file is not None and getattr(model, "generation_config", None) is not None:
        setattr(model, _SOURCE, (Path(file).read_bytes(), model.generation_config.to_dict()))


@contextmanager
def keep_generation_config(model: Any) -> Iterator[None]:
    """Let `save_pretrained` write a model's generation config as it is, whatever is in it.

    transformers itself saves none with a temperature but without `do_sample`, as Llama 2's chat models have, and then
    no model either. A config that came from a file and was not changed is that file's bytes.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    content, loaded = getattr(model, _SOURCE, (b"", None))
    if config.to_dict() != loaded:
        content = config.to_json_string(keys_to_pop=["compile_config"]).encode()

    def write(folder: str | Path, **unused: Any) -> None:
        Path(folder, GENERATION_CONFIG_NAME).write_bytes(content)

    config.save_pretrained = write
    try:
        yield
    finally:
        del config.save_pretrained


def save_model(model: Any, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a transformers model for `from_pretrained`, its generation config as it is.

    Args:
        model: whose config and state are written.
        folder: made if it is not there.
        state: tensors by the model's names, to be written instead of its own; the config names their type.
    """
    with keep_generation_config(model):
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    if state:
        model.config.dtype = next(iter(state.values())).dtype
        model.config.save_pretrained(folder)
