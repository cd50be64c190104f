"""What every arm is given: for each step the same prompts, by token ids, and the same limit of each response."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import DecoderShape
from ppo_ray import preflight
from ppo_ray.config import Config
from ppo_ray.errors import InputError
from ppo_ray.models.actor_critic import VALUE_HEAD_FILE, make_value_head, save_value_head
from ppo_ray.rollout.actor import draw_limits
from ppo_ray.seeding import derive_seed

_LINKED = ("model.safetensors", "tokenizer.json", "generation_config.json")


@dataclass(frozen=True)
class Portion:
    """The samples of a step."""

    prompt_ids: list[list[int]]
    max_new_tokens: list[int]
    """Limit of each response."""


def portions(config: Config) -> list[Portion]:
    """Return what a run by this config works on, step by step.

    Raises:
        InputError: prompts would be left out, so that the batches of the arms were of different sizes.
    """
    stream, found = preflight.check(config).open_prompts(config, print), []
    for step in range(config.steps):
        batch = stream.take(config.rollout.batch_size)
        if batch.num_skipped:
            raise InputError(
                f"step {step}: {batch.num_skipped} texts make no prompts, and TRL takes whole batches only"
            )
        limits = draw_limits(config.rollout, config.seed, step, batch.addresses)
        found.append(Portion([list(ids) for ids in batch.prompt_ids], limits))
    return found


def trl_work(config: Config, mode: str, threads: int, folder: Path) -> dict[str, Any]:
    """Return what `trl_loop.py` reads; models that transformers 4.45 can load are put into the folder.

    Args:
        config: of ppo_ray's run.
        mode: `one` prompt per call of generate, or `batched`.
        threads: of torch.
        folder: of the arm.
    """
    assert config.reward.path is not None
    policy, value_head = Path(config.model.path), folder / VALUE_HEAD_FILE
    first_head = make_value_head(
        DecoderShape.read(policy).hidden, torch.float32, derive_seed(config.seed, "value_head")
    )
    save_value_head(value_head, first_head.state_dict())
    return {
        "policy": str(older_copy(policy, folder / "policy")),
        "value_head": str(value_head),
        "classifier": str(older_copy(Path(config.reward.path), folder / "classifier")),
        "label": config.reward.label,
        "mode": mode,
        "seed": config.seed,
        "threads": threads,
        "learning_rate": config.ppo.learning_rate,
        "epochs": config.ppo.epochs,
        "steps": [vars(portion) for portion in portions(config)],
    }


def older_copy(source: Path, target: Path) -> Path:
    """Make a folder of the same model that transformers 4.45 reads as transformers 5 reads the source.

    The older one knows neither `rope_parameters` (without `rope_theta` it silently computes another model), nor
    `dtype`, nor the class name of a tokenizer that is nothing but its `tokenizer.json`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in _LINKED:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            (target / name).symlink_to((source / name).resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        if rope.get("rope_type", "default") != "default":
            raise InputError(f"{source}: rope_type={rope['rope_type']} has another form in transformers 4.45")
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", "float32")
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1), encoding="utf-8")
    return target
