"""Writing a model with its tokenizer as `from_pretrained` reads them."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_LOADED_HOW = ("is_local", "local_files_only")  # the second is HF_HUB_OFFLINE's: the same build would give other bytes


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer to a folder, and nothing of how they were loaded.

    Raises:
        OSError: the disk is full, which safetensors says with an error of its own kind.
    """
    for option in _LOADED_HOW:
        tokenizer.init_kwargs.pop(option, None)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
