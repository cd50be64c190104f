"""What engines get of a policy with adapters (LoRA): whole weights, or the adapters alone."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ppo_ray.config import DEFAULT_RANK, Config, LoraConfig, RolloutConfig, Trust

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 can make room for; adapters of another rank take the room of the next."""
_MERGED = "rollout.adapter_sync=merged sends whole weights, the adapters merged into them"
ADAPTABLE = (
    *("gemma", "glm", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2"),
    *("qwen3", "smollm3", "starcoder2"),
)
"""Kinds of models of which vLLM 0.32 was seen to compute adapters as the model itself does; see docs/lora.md."""


def sends_adapters(config: Config) -> bool:
    """Say whether engines get the adapters alone, as `rollout.adapter_sync` has it."""
    lora, rollout = config.model.lora, config.rollout
    if lora is None or rollout.adapter_sync != "auto":
        return lora is not None and rollout.adapter_sync == "adapter"
    if rollout.engine != "vllm" or not rollout.gpus or rollout.engine_dtype == "float32" or config.model.quantization:
        return False  # engines would read weights that are not quantised
    return _kind(config.model.path, config.model.trust) in ADAPTABLE


@cache
def _kind(path: str, trust: Trust) -> str:
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(path, trust_remote_code=trust.remote_code, **trust.place)
    return str(found.model_type)


def find_adapter_problem(rollout: RolloutConfig, lora: LoraConfig | None, model: Any) -> str | None:
    """Say why engines on vLLM cannot be sent adapters alone, where they were asked for, or None.

    Args:
        rollout: of the run; the engine on transformers takes any adapters that the learner takes.
        lora: the adapters.
        model: config of the model that they adapt, of transformers.
    """
    if lora is None or rollout.adapter_sync != "adapter" or rollout.engine != "vllm":
        return None
    if model.model_type not in ADAPTABLE:
        served = ", ".join(ADAPTABLE)
        return f"vLLM 0.32 was not seen to serve adapters of the kind {model.model_type} (but {served}). {_MERGED}"
    if not round_rank(rank := _read_rank(lora)):
        return f"vLLM serves adapters up to rank {ENGINE_RANKS[-1]}, and these have rank {rank}. {_MERGED}"
    return None


def _read_rank(lora: LoraConfig) -> int:
    """Return the largest rank of adapters; of those that cannot be read here, which is said elsewhere, the default."""
    file = Path(lora.path or "") / "adapter_config.json"
    if lora.path is None or not file.is_file():
        return lora.rank or DEFAULT_RANK
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
        return max([int(options["r"]), *(options.get("rank_pattern") or {}).values()])
    except (AttributeError, KeyError, TypeError, ValueError):
        return DEFAULT_RANK


def round_rank(rank: int) -> int:
    """Return the smallest rank that vLLM can make room for and that holds adapters of a rank; 0: there is none."""
    return min((one for one in ENGINE_RANKS if one >= rank), default=0)
