"""What engines on vLLM can sample from, told by a config; vLLM itself, whose import takes seconds, is not loaded."""

import importlib.util
import platform
import re
from pathlib import Path
from typing import Any

import torch

from ppo_ray.config import LoraConfig, RolloutConfig
from ppo_ray.plan.adapters import find_adapter_problem

ADVICE = "rollout.engine=hf samples with transformers, slower, from any model the learner takes"
"""Ends what is said of a model that vLLM does not serve."""
_LONGEST = 300  # characters of a reason
_UNSERVED = {
    "vLLM 0.32 cannot run models of the kind {kind}": (
        *("aria_text", "axk1", "bamba", "blt", "codegen", "cohere_compass_text", "dbrx", "deepseek_v4", "diffllama"),
        *("fuyu", "git", "gpt_neo", "gpt_neox_japanese", "jetmoe", "laguna", "minimax", "minimax_m3_vl_text", "mpt"),
        *("openai-gpt", "phimoe", "qwen4_exp", "rwkv", "xglm", "zamba"),
    ),
    "vLLM 0.32, tried on a CPU, computes other log-probabilities than the model's own for the kind {kind}": (
        *("apertus", "doge", "ernie4_5_moe", "hrm_text", "lfm2", "lfm2_moe", "moshi", "zamba2", "zaya"),
    ),
    "vLLM 0.32, tried on a CPU, computes wrong log-probabilities for the kind {kind} after an update of its weights": (
        *("bert-generation", "ctrl"),
    ),
    "vLLM cannot replace the experts' weights of the kind {kind}": ("gpt_oss",),
    "the log-probabilities of vLLM 0.32 could not be compared with the model's own for the kind {kind}": (
        *("hy_v3", "longcat_flash", "mimo_v2_flash", "minimax_m2"),
    ),
}
"""Kinds of models that engines on vLLM cannot sample from, by the reason; docs/models.md has what was tried."""
_UNSERVED_ON_CPU = {
    "vLLM 0.32 cannot run models of the kind {kind} on a CPU": (
        *("axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "falcon_mamba", "glm4_moe_lite", "glm_moe_dsa"),
        *("hy_v4", "jamba", "kimi_linear", "mamba", "nemotron_h", "olmo_hybrid", "qwen3_next", "youtu"),
    ),
}
"""Those that GPUs may serve."""
_NEEDS = {
    "afmoe": ("score_func", "route_norm", "n_group"),
    "deepseek_v3": ("topk_method",),
    "glm4_moe": ("head_dim",),
    "glm4_moe_lite": ("first_k_dense_replace",),
}
"""What vLLM reads of a kind's config, and transformers neither writes nor reads."""
_SEEING = (
    *("gemma3", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
    "qwen4_exp_text",
)
"""Kinds whose code in vLLM imports torchvision, which an installation for CPUs has not."""
_NO_WINDOWS = ("qwen2", "qwen2_moe", "qwen3")
"""Kinds whose attention windows vLLM leaves out, or refuses only as it starts."""


def find_engine_problem(rollout: RolloutConfig, model: Any, lora: LoraConfig | None = None) -> str | None:
    """Say why engines on vLLM cannot sample from a model with ever new weights, or None; vLLM itself is not imported.

    Args:
        rollout: of the run; other engines have no problem, and what vLLM lacks on a CPU alone is none on GPUs.
        model: its config, of transformers.
        lora: its adapters.
    """
    text = model.get_text_config()
    if rollout.engine != "vllm":
        return None
    for reason, kinds in (_UNSERVED if rollout.gpus else _UNSERVED | _UNSERVED_ON_CPU).items():
        if kind := next((kind for kind in (model.model_type, text.model_type) if kind in kinds), None):
            return f"{reason.format(kind=kind)}. {ADVICE}"
    if problem := find_adapter_problem(rollout, lora, model):
        return problem
    for needed in _NEEDS.get(text.model_type, ()):
        if getattr(text, needed, None) in (None, ""):
            return f"vLLM needs {needed} in the config.json of the kind {text.model_type}. {ADVICE}"
    if model.model_type in _SEEING and importlib.util.find_spec("torchvision") is None:
        return f"vLLM needs torchvision for the kind {model.model_type}, which is not installed. {ADVICE}"
    if text.model_type in _NO_WINDOWS and getattr(text, "sliding_window", None):
        return (
            f"vLLM does not compute the attention windows of the kind {text.model_type} (use_sliding_window). {ADVICE}"
        )
    latent = getattr(text, "kv_lora_rank", None) is not None  # DeepSeek's attention, which has heads of another size
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    sizes = {size for layer in layers if (size := _head_size(layer))} if not rollout.gpus and not latent else set()
    if lacking := [size for size in sorted(sizes) if not _has_attention(size)]:
        return (
            f"its attention heads have {lacking[0]} units, and vLLM has no attention for that size on a CPU. {ADVICE}"
        )
    return None


def explain_start(error: Exception) -> str:
    """Give the reason why vLLM does not start in a few words: pydantic wraps them, and lists may follow."""
    words = " ".join(str(error).split())
    wrapped = re.search(r"Value error, (.*?)(?: \[type=|$)", words)
    words = (wrapped.group(1) if wrapped else words).partition(". ")[0][:_LONGEST].rstrip(".")
    return words if isinstance(error, OSError | RuntimeError | ValueError) else f"{type(error).__name__} {words}"


def _head_size(layer: Any) -> int | None:
    """Return the units of an attention head by a config; None: it has no such number."""
    size, heads, width = (getattr(layer, name, None) for name in ("head_dim", "num_attention_heads", "hidden_size"))
    if not size and heads and isinstance(heads, int) and isinstance(width, int):
        size = width // heads
    return size if isinstance(size, int) else None


def _has_attention(size: int) -> bool:
    """Ask vLLM's library for this CPU whether it has attention for heads of a size; True where it cannot be asked."""
    name = "_C.abi3.so"
    if platform.machine() == "x86_64" and not torch.cpu._is_avx512_bf16_supported():
        name = "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"
    package = importlib.util.find_spec("vllm")  # its import would take seconds
    lengths = torch.tensor([1], dtype=torch.int32), torch.float32, torch.tensor([0, 1], dtype=torch.int32)
    kind = "vec16" if size % 32 and size % 16 == 0 else "vec"  # as vLLM chooses
    try:
        torch.ops.load_library(Path(*package.submodule_search_locations, name))  # type: ignore[union-attr, misc]
        torch.ops._C.get_scheduler_metadata(1, 1, 1, size, *lengths, True, -1, kind, False, None, "auto")
    except (AttributeError, OSError, RuntimeError) as error:  # no vLLM, one for GPUs, or another version
        return "Unsupported CPU attention" not in str(error)
    return True
