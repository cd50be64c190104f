"""The whole config of a run: typed, frozen, documented; what a YAML file and `key=value` overrides are read into.

Defaults are TRL 0.11's where TRL has the option; its name follows "TRL:".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from ppo_ray.config.file import Contradiction, Contradictions, load
from ppo_ray.config.ppo import UpdateConfig
from ppo_ray.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    PromptsConfig,
    RayConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    Source,
)


class Config(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything random in the run, held-out prompts excepted. TRL: `seed`."""
    steps: int = Field(default=100, ge=1)
    """Cycles of generation, scoring, update and weight broadcast. TRL: `steps` counts responses instead."""
    output_dir: Source
    """Folder that the run writes to; it must not hold another run, unless that is resumed. Required."""
    resume: Literal["never", "auto", "required"] = "never"
    """Whether the run in output_dir goes on from its newest checkpoint: never (a run there is an error), auto (if there
    is one), required (there must be one: `ppo-ray train CONFIG --resume`)."""
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    ppo: UpdateConfig = Field(default_factory=UpdateConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @property
    def colocated(self) -> bool:
        """Whether every engine's rank shares its GPU with a learner's."""
        ranks = self.rollout.workers * self.rollout.tensor_parallel
        return bool(self.rollout.gpus) and self.ray.placement == "colocated" and self.learner.workers == ranks

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        found = _contradictions(self)
        if found:
            raise Contradictions(found)
        return self


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """Read a YAML file and `key=value` overrides into a config.

    Args:
        path: the file; None for overrides alone. `${oc.env:NAME}` in it is the environment variable NAME.
        overrides: each `section.option=value`, the value read as YAML; they win over the file, later over earlier.

    Raises:
        InputError: the file cannot be read, or options are unknown, ill-typed, out of bounds or contradict one another:
            a line for each, all at once.
    """
    return load(Config, path, overrides)


def to_yaml(config: Config) -> str:
    """Write out every option, defaults included, as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _contradictions(config: Config) -> list[Contradiction]:
    """Find the options that are right alone and wrong together."""
    prompts, rollout, reward = config.prompts, config.rollout, config.reward
    evaluation = config.evaluation
    found: list[Contradiction] = []

    def refuse_unless(consistent: bool, keys: tuple[str, ...], message: str) -> None:
        if not consistent:
            found.append(Contradiction(keys, message))

    refuse_unless(
        prompts.min_tokens <= prompts.max_tokens,
        ("prompts.min_tokens", "prompts.max_tokens"),
        f"{prompts.min_tokens} exceeds prompts.max_tokens={prompts.max_tokens}",
    )
    refuse_unless(
        rollout.min_response_tokens <= rollout.max_response_tokens,
        ("rollout.min_response_tokens", "rollout.max_response_tokens"),
        f"{rollout.min_response_tokens} exceeds rollout.max_response_tokens={rollout.max_response_tokens}",
    )
    longest = prompts.max_tokens + rollout.max_response_tokens
    refuse_unless(
        longest <= rollout.max_context,
        ("rollout.max_context", "prompts.max_tokens", "rollout.max_response_tokens"),
        f"{rollout.max_context} tokens cannot hold prompts.max_tokens={prompts.max_tokens} "
        f"+ rollout.max_response_tokens={rollout.max_response_tokens} = {longest}",
    )
    refuse_unless(
        rollout.workers <= rollout.batch_size,
        ("rollout.workers", "rollout.batch_size"),
        f"{rollout.workers} workers, but rollout.batch_size={rollout.batch_size}: some would have nothing to generate",
    )
    _check_update(config, refuse_unless)
    refuse_unless(
        config.model.critic == "separate" or config.model.critic_path is None,
        ("model.critic_path", "model.critic"),
        "is for model.critic=separate; set that, or leave critic_path out",
    )
    refuse_unless(
        (reward.path is None) != (reward.function is None),
        ("reward.path", "reward.function"),
        "give reward.path (a classifier) or reward.function (a Python function), "
        + ("one of them" if reward.path is None else "not both"),
    )
    _check_placement(config, refuse_unless)
    refuse_unless(
        evaluation.num_samples <= evaluation.num_prompts or evaluation.num_prompts == 0,
        ("evaluation.num_samples", "evaluation.num_prompts"),
        f"{evaluation.num_samples} exceeds evaluation.num_prompts={evaluation.num_prompts}",
    )
    return found + _contradictions_of_overlap(config)


def _check_update(config: Config, refuse_unless: Callable[[bool, tuple[str, ...], str], None]) -> None:
    """Find what does not go together in the update: mini-batches, the KL, warm-ups."""
    rollout, ppo = config.rollout, config.ppo
    refuse_unless(
        ppo.minibatch_size is None or rollout.batch_size % ppo.minibatch_size == 0,
        ("ppo.minibatch_size", "rollout.batch_size"),
        f"{ppo.minibatch_size} does not divide rollout.batch_size={rollout.batch_size}",
    )
    minibatch_size = ppo.minibatch_size or rollout.batch_size
    refuse_unless(
        minibatch_size % ppo.gradient_accumulation == 0,
        ("ppo.gradient_accumulation", "ppo.minibatch_size", "rollout.batch_size"),
        f"{ppo.gradient_accumulation} equal parts cannot be made of a mini-batch of {minibatch_size} trajectories",
    )
    refuse_unless(
        ppo.kl_estimator != "full" or ppo.kl_in == "reward",
        ("ppo.kl_estimator", "ppo.kl_in"),
        "full is for kl_in=reward; with kl_in=loss take k2, whose gradient is the divergence's",
    )
    refuse_unless(
        ppo.kl_estimator != "k1" or ppo.kl_in == "reward",
        ("ppo.kl_in", "ppo.kl_estimator"),
        "loss is not for kl_estimator=k1, whose gradient knows nothing of the reference: take k2, whose gradient is "
        "the divergence's, or k3",
    )
    refuse_unless(
        ppo.warmup_steps <= config.steps,
        ("ppo.warmup_steps", "steps"),
        f"{ppo.warmup_steps} exceeds steps={config.steps}: the warm-up would never end",
    )
    refuse_unless(
        ppo.value_warmup_steps < config.steps,
        ("ppo.value_warmup_steps", "steps"),
        f"{ppo.value_warmup_steps} of steps={config.steps}: the policy would never learn",
    )


def _contradictions_of_overlap(config: Config) -> list[Contradiction]:
    """Find what does not go with generation that overlaps with learning."""
    found: list[Contradiction] = []
    if config.rollout.max_staleness == 0:
        return found
    if config.ppo.importance_cap is None:
        message = (
            "1 makes samples of the policy before the last update, which importance weights must correct; set "
            "ppo.importance_cap (2 is usual)"
        )
        found.append(Contradiction(("rollout.max_staleness", "ppo.importance_cap"), message))
    if config.ray.placement == "colocated":
        message = (
            "colocated engines sleep while the learner works, and with rollout.max_staleness=1 they sample: set apart"
        )
        found.append(Contradiction(("ray.placement", "rollout.max_staleness"), message))
    if config.checkpoint.keep_best and config.checkpoint.keep_last == 1:
        message = (
            "1 removes a checkpoint before the score of its policy is known, with rollout.max_staleness=1; set 2 or "
            "more, or checkpoint.keep_best=false"
        )
        found.append(Contradiction(("checkpoint.keep_last", "rollout.max_staleness"), message))
    return found


def _check_placement(config: Config, refuse_unless: Callable[[bool, tuple[str, ...], str], None]) -> None:
    """Find contradictions of who sits on which GPUs."""
    rollout, learner, ranks = config.rollout, config.learner, config.rollout.tensor_parallel
    for key, gpus in (("rollout", rollout.gpus), ("reward", config.reward.gpus), ("learner", learner.gpus)):
        whole = gpus <= 1 or gpus == int(gpus)
        refuse_unless(whole, (f"{key}.gpus",), f"{gpus:g} is more than one GPU and not a whole number of them")
    refuse_unless(
        ranks == 1 or (rollout.engine == "vllm" and rollout.gpus == 1),
        ("rollout.tensor_parallel", "rollout.engine", "rollout.gpus"),
        f"{ranks} ranks need rollout.engine=vllm and rollout.gpus=1, a whole GPU each; vLLM has no ranks on CPUs",
    )
    if config.ray.placement == "apart":
        return
    refuse_unless(
        bool(rollout.gpus) == bool(learner.gpus) and max(rollout.gpus, learner.gpus, config.reward.gpus) <= 1,
        ("ray.placement", "rollout.gpus", "learner.gpus", "reward.gpus"),
        "colocated shares each GPU between an engine, a learner rank and rewards: set rollout.gpus and learner.gpus to "
        "1 both, or to 0 both",
    )
    refuse_unless(
        learner.workers <= rollout.workers * ranks,
        ("ray.placement", "learner.workers", "rollout.workers", "rollout.tensor_parallel"),
        f"colocated puts each learner rank beside an engine's: {learner.workers} ranks need as many of "
        f"rollout.workers={rollout.workers} x rollout.tensor_parallel={ranks}",
    )
