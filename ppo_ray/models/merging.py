"""Whole models made of a base and its adapters: for engines to start with, and for those who want one folder."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModel

from ppo_ray.config import ModelConfig
from ppo_ray.config.file import read_plain
from ppo_ray.errors import InputError
from ppo_ray.models.actor_critic import CRITIC_FOLDER, VALUE_HEAD_FILE
from ppo_ray.models.adapter_files import CONFIG_FILE, load_adapters, make_adapter_config
from ppo_ray.models.loading import cast, default_device, load_causal_lm, load_pretrained, load_tokenizer
from ppo_ray.models.lora import add_adapters, merge_in_place
from ppo_ray.models.quantization import quantize, set_dtype, unquantize
from ppo_ray.models.saving import save_model


def merge_model(model: ModelConfig, folder: Path, dtype: str = "float32") -> None:
    """Write base and adapters as one model with its tokenizer, for `from_pretrained`.

    The base of a quantised run is what its codes stand for, as the learner computed with it.

    Args:
        model: with `lora.path`.
        folder: is made.
        dtype: of the written weights; the sum is in float32, and rounded once.

    Raises:
        InputError: base or adapters cannot be loaded, or do not fit one another.
    """
    assert model.lora is not None and model.lora.path is not None
    causal_lm = load_causal_lm(model.path, trust=model.trust)
    _merge(causal_lm, model, model.lora.path, dtype)
    save_model(causal_lm, folder)
    load_tokenizer(model.path, model.trust).save_pretrained(folder)


def merge_checkpoint(checkpoint: Path, output: Path, dtype: str = "float32", base: str | None = None) -> None:
    """Write a checkpoint of a run with LoRA as a whole model, its value head or critic included.

    Args:
        checkpoint: a folder such as `RUN/checkpoints/final`.
        output: folder to be made; it must not exist.
        dtype: as in `merge_model`.
        base: folder or hub name of the base; None: the one that the checkpoint's config names.

    Raises:
        InputError: it is no such checkpoint, the output exists, or as `merge_model`.
    """
    if not (checkpoint / CONFIG_FILE).is_file():
        whole = " (it is a whole model already)" if (checkpoint / "config.json").is_file() else ""
        raise InputError(f"{checkpoint}: holds no {CONFIG_FILE}, so it is no checkpoint of a run with LoRA{whole}")
    if output.exists():
        raise InputError(f"{output}: exists; give a folder that does not")
    config = checkpoint / "config.yaml"
    options = read_plain(config) if config.is_file() else {}
    base = base or options.get("model.path")
    if not base:
        raise InputError(f"{checkpoint}: has no config.yaml that names the base; give it: --base FOLDER")
    own = {name: options[f"model.{name}"] for name in ("dtype", "quantization") if f"model.{name}" in options}
    revision = options.get("model.revision") if base == options.get("model.path") else None
    lora = {"path": str(checkpoint)}
    model = ModelConfig.model_validate({"path": base, "revision": revision, "lora": lora, **own})
    merge_model(model, output, dtype)
    critic = checkpoint / CRITIC_FOLDER
    if (critic / CONFIG_FILE).is_file():
        path, trust = options.get("model.critic_path") or base, model.trust
        decoder = load_pretrained(AutoModel, path, dtype="float32", device="cpu", trust=trust)
        _merge(decoder, model.model_copy(update={"path": path}), str(critic), dtype)
        save_model(decoder, output / CRITIC_FOLDER)
    for head in (VALUE_HEAD_FILE, Path(CRITIC_FOLDER) / VALUE_HEAD_FILE):
        if (checkpoint / head).is_file():
            (output / head).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkpoint / head, output / head)


def _merge(network: torch.nn.Module, model: ModelConfig, path: str, dtype: str) -> None:
    """Merge the adapters at a path into a network, in place, and round it."""
    assert model.lora is not None
    lora = model.lora.model_copy(update={"path": path})
    if model.quantization:
        quantize(network, model.quantization, default_device())
        set_dtype(network, getattr(torch, model.dtype))
        unquantize(network.cpu())
        for parameter in network.parameters():
            cast(parameter, getattr(torch, model.dtype))
        network.float()
    add_adapters(network, make_adapter_config(lora, model.path), 0)
    load_adapters(network, path)
    merge_in_place(network)
    for parameter in network.parameters():
        cast(parameter, getattr(torch, dtype))
