"""Writing of models for `from_pretrained`: their tensors, hashed on the way, and generation_config.json as it is.

A safetensors file is the length of a header, the header, which is JSON, and the tensors' bytes one after the other. The
library writes it from a copy in memory or without telling when; here its bytes are hashed as they are written.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

State = dict[str, torch.Tensor]
"""A module's parameters and buffers by name, as `state_dict` has them."""
_SOURCE = "_generation_config_source"
_DTYPES = {"int64": "I64", "float64": "F64", "float32": "F32", "int32": "I32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # in the order of the tensors in a file
_PIECE = 4 << 20  # bytes that are hashed and written at a time: they stay in the processor's cache


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of a checkpoint, and the tensors that it is made of; several ranks may write parts of it."""

    path: Path
    """In the checkpoint."""
    tensors: State
    rename: Callable[[State], State] = dict
    """Returns tensors under their names in the file, of all tensors or of those of some layers."""
    has_parts: bool = True
    """Whether it may be split into parts with an index, as transformers splits a model."""


@dataclass(frozen=True)
class WrittenFile:
    """A safetensors file on the disk."""

    size: int
    """Bytes."""
    checksum: str
    """XXH3-64 of its bytes, hexadecimal."""
    names: list[str]
    """Of its tensors."""
    tensor_bytes: int


def model_file(model: Any, folder: Path, tensors: State) -> TensorFile:
    """Return the file of a transformers model's weights in a checkpoint.

    Args:
        model: whose tensors they are.
        folder: in the checkpoint.
        tensors: by the model's names.
    """

    def rename(some: State) -> State:
        kept = {name: tensor for name, tensor in some.items() if name not in (model._keys_to_ignore_on_save or ())}
        return revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))

    return TensorFile(folder / SAFE_WEIGHTS_NAME, tensors, rename)


def write_tensors(path: Path, tensors: State) -> WrittenFile:
    """Write tensors of the host as a safetensors file, the very bytes that the library would write, and sync it.

    Raises:
        OSError: the disk is full, or may not be written to.
    """
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    ordered = sorted(tensors.items(), key=lambda item: (list(_DTYPES).index(dtypes[item[0]]), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[dtypes[name]], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = xxhash.xxh3_64()
    with path.open("wb") as file:
        for content in (memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(tensor) for _, tensor in ordered)):
            for start in range(0, len(content), _PIECE):
                piece = content[start : start + _PIECE]
                state.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(8 + len(text) + end, state.hexdigest(), [name for name, _ in ordered], end)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def name_part(path: Path, number: int, count: int) -> Path:
    """Return the path of a part of a safetensors file, as transformers names it: parts are numbered from 1."""
    return path if count == 1 else path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def write_index(path: Path, parts: Mapping[str, WrittenFile]) -> None:
    """Write the index of a file in several parts, as transformers reads it; the parts by their names beside it."""
    names = {name: part for part, written in parts.items() for name in written.names}
    total = sum(written.tensor_bytes for written in parts.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    _index_path(path).write_text(json.dumps(index, indent=2), encoding="utf-8")


def find_parts(path: Path) -> list[Path]:
    """Return the parts of a safetensors file that has an index beside it, else the file itself.

    Raises:
        OSError: the index cannot be read.
        ValueError: it is damaged.
    """
    index = _index_path(path)
    if not index.is_file():
        return [path]
    try:
        parts = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(path.with_name(part) for part in parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index") from error


def _index_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


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


def save_model(model: Any, folder: str | Path) -> None:
    """Write a transformers model for `from_pretrained`, its generation config as it is; makes the folder."""
    with keep_generation_config(model):
        model.save_pretrained(folder)


def save_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write what `from_pretrained` reads beside the weights; the config names the type of these. Makes the folder."""
    with keep_generation_config(model):
        model.save_pretrained(folder, state_dict={})
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
