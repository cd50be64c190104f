"""What the learner can compute exactly, told by a model's config and its layers, without its weights."""

import inspect
from collections.abc import Mapping
from typing import Any

from ppo_ray.errors import InputError

_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CHOOSE = "Choose a model without it, such as GPT-2, Llama or Qwen."
"""Ends what is said of a model that the learner does not compute."""
_UNTRAINABLE = {"reformer": "computes gradients in training mode alone, with dropout"}
"""Why a kind of model cannot learn, by its `model_type`."""


def find_config_problem(config: Any, is_critic: bool = False) -> str | None:
    """Say why a model of this config cannot be a policy or reference, or None.

    Args:
        config: of transformers.
        is_critic: whether it is to be a critic, whose logits do not matter.
    """
    if getattr(config, "is_encoder_decoder", False):
        return f"is an encoder-decoder ({config.model_type}); give a model that is a decoder alone"
    if reason := _UNTRAINABLE.get(config.model_type):
        return f"{reason}; the learner has none. {CHOOSE}"
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        return (
            f"is stored in codes ({method} in quantization_config of its config.json), which are not trained on; give "
            "the model that they were made of. model.quantization makes codes of it"
        )
    if is_critic:
        return None
    text = config.get_text_config()
    changes = {name: value for name in _LOGIT_CAPS if (value := getattr(text, name, None))}
    changes |= {name: value for name in _LOGIT_SCALES if (value := getattr(text, name, None)) not in (None, 1)}
    if changes:
        return f"changes its logits after the output embedding ({changes}); the learner does not. {CHOOSE}"
    return None


def find_positions(config: Any) -> int | None:
    """Return the tokens of the longest sequence that a model's config has positions for; None: it names no limit.

    Args:
        config: of transformers.
    """
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # MPT's is the second
    return min((int(limit) for limit in named if isinstance(limit, int) and limit > 0), default=None)  # XLNet's is -1


def max_exact_tokens(config: Any) -> tuple[int, str] | None:
    """Return up to how many tokens a sequence's figures are its own, and the rope type that says so, or None.

    Beyond that, the rotary frequencies of `longrope` and `dynamic` go by the longest sequence of a forward pass: those
    of a short sequence would depend on its neighbours, and be others than an engine's.

    Args:
        config: of transformers.
    """
    text = config.get_text_config()
    positions = find_positions(config)
    limits: list[tuple[int, str]] = []
    for rope in rope_parameters(config):
        kind = rope.get("rope_type", "default")
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        limit = (original or positions) if kind == "longrope" else positions
        if kind in ("longrope", "dynamic") and limit:
            limits.append((int(limit), kind))
    return min(limits, default=None)


def rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Return the parameters of a model's rotary positions; some models have one set per kind of layer.

    Args:
        config: of transformers.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, Mapping)]
    return nested or [found]


def find_decoder(causal_lm: Any) -> Any:
    """Return the part of a causal LM that computes the last hidden state: its base model, or Llama 4's `model`."""
    base = causal_lm.base_model
    return getattr(causal_lm, "model", base) if base is causal_lm else base


def _can_load(config: Any) -> bool:
    """Say whether a causal LM that was saved with this config can be loaded; one with its own code brings the class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return hasattr(config, "auto_map") or any(kind in MODEL_FOR_CAUSAL_LM_MAPPING for kind in type(config).__mro__)


def check_head(causal_lm: Any) -> None:
    """Check that a causal LM's output embedding is a linear map of the decoder's last hidden state.

    Args:
        causal_lm: of transformers, on any device, the meta device too.

    Raises:
        InputError: its config says that it is not, there is no linear output embedding, it cannot be loaded once it is
            saved, or it is an encoder-decoder's decoder (BART), whose positions count the padding that engines put
            before a prompt.
    """
    name = causal_lm.config.name_or_path or type(causal_lm).__name__
    if problem := find_config_problem(causal_lm.config):
        raise InputError(f"the model {name!r} {problem}")
    if not _can_load(causal_lm.config):
        raise InputError(
            f"the model {name!r} is a part of another ({causal_lm.config.model_type}), which AutoModelForCausalLM does "
            "not load by itself, so a checkpoint of it could not be loaded; give a model that is a decoder alone"
        )
    decoder, kind = find_decoder(causal_lm), type(causal_lm).__name__
    if decoder is causal_lm:
        raise InputError(f"the model {name!r} has no decoder apart from its head ({kind}); {CHOOSE}")
    if "input_ids" not in inspect.signature(decoder.forward).parameters:
        raise InputError(
            f"the model {name!r} is the decoder of an encoder-decoder ({kind}), which engines cannot sample from in "
            "batches; give a model that is a decoder alone, such as GPT-2, Llama or Qwen"
        )
    weight = getattr(causal_lm.get_output_embeddings(), "weight", None)
    if weight is None or weight.ndim != 2:
        raise InputError(f"the model {name!r} has no linear output embedding; give a causal language model with one")
