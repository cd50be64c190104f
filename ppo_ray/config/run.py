"""The whole config of a run: typed, frozen and documented. A YAML file and `key=value` overrides are read into it.

Defaults are TRL 0.11's where TRL has the option; its name follows "TRL:".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from ppo_ray.config.file import Contradiction, Contradictions, load
from ppo_ray.config.learner import LearnerConfig, learner_contradictions, lora_contradictions
from ppo_ray.config.ppo import UpdateConfig, algorithm_contradictions
from ppo_ray.config.prompts import EvaluationConfig, PromptsConfig, evaluation_contradictions, prompts_contradictions
from ppo_ray.config.reward import RewardConfig, reward_contradictions
from ppo_ray.config.rollout import RolloutConfig, engine_contradictions, group_contradictions
from ppo_ray.config.sections import CheckpointConfig, Folder, ModelConfig, RayConfig, Section
from ppo_ray.config.tracking import TrackingConfig, tracking_contradictions


class Config(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random in the run, held-out prompts excepted. TRL: `seed`."""
    steps: int = Field(default=100, ge=1)
    """Number of steps: cycles of generation, scoring, update and weight broadcast. TRL: `steps` counts responses
    instead."""
    output_dir: Folder
    """Folder that the run writes to. It must not hold another run, unless that is resumed. Required."""
    resume: Literal["never", "auto", "required"] = "never"
    """Whether the run in output_dir goes on from its newest checkpoint: never (a run there is an error), auto (if there
    is one), required (there must be one: `ppo-ray train CONFIG --resume`)."""
    report: bool = True
    """Whether the run ends with a report of itself, report.html in output_dir; `ppo-ray report` makes one at any
    time."""
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    ppo: UpdateConfig = Field(default_factory=UpdateConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @property
    def max_context(self) -> int:
        """Longest prompt plus response that an engine has room for, in tokens."""
        longest = self.prompts.max_tokens + self.rollout.max_response_tokens
        return longest if self.rollout.max_context is None else self.rollout.max_context

    @property
    def colocated(self) -> bool:
        """Whether every engine's rank shares its GPU with a learner's."""
        ranks = self.rollout.workers * self.rollout.tensor_parallel
        return bool(self.rollout.gpus) and self.ray.placement == "colocated" and self.learner.workers == ranks

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if found := list(_contradictions(self)):
            raise Contradictions(found)
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `key=value` overrides into a config.

    Args:
        path: the file; None for overrides alone. `${oc.env:NAME}` in it is the environment variable NAME. Relative
            paths in it start at the current folder.
        overrides: each `section.option=value`, the value read as YAML; they win over the file, later over earlier.

    Raises:
        InputError: the file cannot be read, or options are unknown, ill-typed, out of bounds or contradict one another:
            a line for each, all at once.
    """
    return load(Config, None if path is None else Path(path), overrides)


def to_yaml(config: Config) -> str:
    """Write out every option, defaults included, as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield the options that are right alone and wrong together."""
    yield from prompts_contradictions(config.prompts)
    yield from _length_contradictions(config)
    yield from _update_contradictions(config)
    yield from algorithm_contradictions(config.ppo, config.rollout, config.model)
    yield from _source_contradictions(config)
    yield from engine_contradictions(config.rollout)
    yield from group_contradictions(config.rollout)
    yield from _placement_contradictions(config)
    yield from learner_contradictions(config.learner, config.model)
    evaluation = config.evaluation
    yield from evaluation_contradictions(evaluation)
    if evaluation.pass_part and evaluation.pass_part not in [part.name for part in config.reward.parts]:
        yield Contradiction(
            ("evaluation.pass_part", "reward.parts"), f"{evaluation.pass_part} is no name of a part of the reward"
        )
    if config.checkpoint.keep_best and config.checkpoint.best_by != "score/mean":
        every, saved = evaluation.every_steps, config.checkpoint.every_steps
        if not every or not saved or every % saved:
            yield Contradiction(
                ("checkpoint.best_by", "evaluation.every_steps", "checkpoint.every_steps"),
                f"{config.checkpoint.best_by} is known of evaluated policies alone: set evaluation.every_steps to a "
                "multiple of checkpoint.every_steps",
            )
    best_set, slash, _ = config.checkpoint.best_by.removeprefix("eval/").partition("/")
    if slash and best_set != "score" and best_set not in evaluation.sets:
        yield Contradiction(
            ("checkpoint.best_by", "evaluation.sets"), f"{best_set} is none of evaluation.sets, whose figures are there"
        )
    yield from tracking_contradictions(config.tracking)
    if config.rollout.max_staleness > 0:
        yield from _overlap_contradictions(config)


def _length_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield the contradictions of lengths in tokens, and of a batch with the workers that share it."""
    prompts, rollout = config.prompts, config.rollout
    if prompts.min_tokens is not None and prompts.min_tokens > prompts.max_tokens:
        yield Contradiction(
            ("prompts.min_tokens", "prompts.max_tokens"),
            f"{prompts.min_tokens} exceeds prompts.max_tokens={prompts.max_tokens}",
        )
    if prompts.min_tokens is not None and prompts.too_long not in (None, "cut"):
        yield Contradiction(
            ("prompts.too_long", "prompts.min_tokens"),
            f"{prompts.too_long} is for whole texts, and with prompts.min_tokens={prompts.min_tokens} every prompt is "
            "the beginning of one; set min_tokens to null, or leave too_long out",
        )
    if prompts.min_tokens is not None and (prompts.chat_template not in ("auto", "none") or prompts.system is not None):
        yield Contradiction(
            ("prompts.min_tokens", "prompts.chat_template", "prompts.system"),
            "is for plain texts; a conversation is a prompt as a whole: set min_tokens to null",
        )
    if prompts.chat_template == "none" and (prompts.system is not None or prompts.template_arguments):
        yield Contradiction(
            ("prompts.chat_template", "prompts.system", "prompts.template_arguments"),
            "none has no place for a system message or arguments; set auto, tokenizer or a file",
        )
    if len(set(prompts.kept_names)) < len(prompts.keep):
        yield Contradiction(("prompts.keep",), f"{', '.join(prompts.keep)}: two columns would have one name")
    if rollout.min_response_tokens is not None and rollout.min_response_tokens > rollout.max_response_tokens:
        yield Contradiction(
            ("rollout.min_response_tokens", "rollout.max_response_tokens"),
            f"{rollout.min_response_tokens} exceeds rollout.max_response_tokens={rollout.max_response_tokens}",
        )
    longest = prompts.max_tokens + rollout.max_response_tokens
    if longest > config.max_context:
        yield Contradiction(
            ("rollout.max_context", "prompts.max_tokens", "rollout.max_response_tokens"),
            f"{config.max_context} tokens cannot hold prompts.max_tokens={prompts.max_tokens} "
            f"+ rollout.max_response_tokens={rollout.max_response_tokens} = {longest}",
        )
    if rollout.batch_size % rollout.responses_per_prompt:
        yield Contradiction(
            ("rollout.responses_per_prompt", "rollout.batch_size"),
            f"{rollout.responses_per_prompt} does not divide rollout.batch_size={rollout.batch_size}, which counts "
            "responses",
        )
    elif rollout.workers > rollout.num_prompts:
        prompts_of = f" / rollout.responses_per_prompt={rollout.responses_per_prompt}"
        yield Contradiction(
            ("rollout.workers", "rollout.batch_size"),
            f"{rollout.workers} workers, but rollout.batch_size={rollout.batch_size}"
            f"{prompts_of if rollout.responses_per_prompt > 1 else ''}: some would have nothing to generate",
        )


def _update_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield the contradictions of the update: mini-batches, the KL, warm-ups."""
    rollout, ppo = config.rollout, config.ppo
    if ppo.minibatch_size is not None and rollout.batch_size % ppo.minibatch_size:
        yield Contradiction(
            ("ppo.minibatch_size", "rollout.batch_size"),
            f"{ppo.minibatch_size} does not divide rollout.batch_size={rollout.batch_size}",
        )
    minibatch_size = ppo.minibatch_size or rollout.batch_size
    if minibatch_size % ppo.gradient_accumulation:
        yield Contradiction(
            ("ppo.gradient_accumulation", "ppo.minibatch_size", "rollout.batch_size"),
            f"{ppo.gradient_accumulation} equal parts cannot be made of a mini-batch of {minibatch_size} trajectories",
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "full":
        yield Contradiction(
            ("ppo.kl_estimator", "ppo.kl_in"),
            "full is for kl_in=reward; with kl_in=loss take k2, whose gradient is the divergence's",
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield Contradiction(
            ("ppo.kl_in", "ppo.kl_estimator"),
            "loss is not for kl_estimator=k1, whose gradient knows nothing of the reference: take k2, whose gradient "
            "is the divergence's, or k3",
        )
    if ppo.kl_clamp is not None and ppo.kl_estimator == "full":
        yield Contradiction(
            ("ppo.kl_clamp", "ppo.kl_estimator"),
            "it bounds estimates from single tokens, and full is no estimate; set kl_clamp to null",
        )
    if ppo.missing_eos_penalty and not rollout.stop_at_eos and not rollout.stop_token_ids:
        yield Contradiction(
            ("ppo.missing_eos_penalty", "rollout.stop_at_eos"),
            f"{ppo.missing_eos_penalty:g} would be taken off every score: with rollout.stop_at_eos=false no response "
            "ends by itself; set that to true, or the penalty to null",
        )
    if ppo.warmup_steps > config.steps:
        yield Contradiction(
            ("ppo.warmup_steps", "steps"),
            f"{ppo.warmup_steps} exceeds steps={config.steps}: the warm-up would never end",
        )
    if ppo.value_warmup_steps >= config.steps:
        yield Contradiction(
            ("ppo.value_warmup_steps", "steps"),
            f"{ppo.value_warmup_steps} of steps={config.steps}: the policy would never learn",
        )


def _source_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield the contradictions of where the critic and the score come from."""
    model, reward = config.model, config.reward
    if model.critic_path is not None and model.critic != "separate":
        yield Contradiction(
            ("model.critic_path", "model.critic"),
            "is for model.critic=separate; set that, or leave critic_path out",
        )
    for key, path, revision in (
        ("model.reference", model.reference_path, model.reference_revision),
        ("model.critic", model.critic_path, model.critic_revision),
        *((key, source.path, source.revision) for key, source in reward.sources),
    ):
        if revision is not None and path is None:
            separator = "_" if key.startswith("model") else "."
            option, where = f"{key}{separator}revision", f"{key}{separator}path"
            yield Contradiction((option, where), f"is for {where}; give that too, or leave it out")
    yield from lora_contradictions(model, config.learner, config.rollout.adapter_sync)
    yield from reward_contradictions(reward)


def _placement_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield the contradictions of who sits on which GPUs."""
    rollout, learner, ranks = config.rollout, config.learner, config.rollout.tensor_parallel
    for key, gpus in (("rollout", rollout.gpus), ("reward", config.reward.gpus), ("learner", learner.gpus)):
        if gpus > 1 and gpus != int(gpus):
            yield Contradiction((f"{key}.gpus",), f"{gpus:g} is more than one GPU and not a whole number of them")
    if ranks > 1 and not (rollout.engine == "vllm" and rollout.gpus == 1):
        yield Contradiction(
            ("rollout.tensor_parallel", "rollout.engine", "rollout.gpus"),
            f"{ranks} ranks need rollout.engine=vllm and rollout.gpus=1, a whole GPU each; vLLM has no ranks on CPUs",
        )
    if config.ray.placement == "apart":
        return
    if bool(rollout.gpus) != bool(learner.gpus) or max(rollout.gpus, learner.gpus, config.reward.gpus) > 1:
        yield Contradiction(
            ("ray.placement", "rollout.gpus", "learner.gpus", "reward.gpus"),
            "colocated shares each GPU between an engine, a learner rank and rewards: set rollout.gpus and "
            "learner.gpus to 1 both, or to 0 both",
        )
    if learner.workers > rollout.workers * ranks:
        yield Contradiction(
            ("ray.placement", "learner.workers", "rollout.workers", "rollout.tensor_parallel"),
            f"colocated puts each learner rank beside an engine's: {learner.workers} ranks need as many of "
            f"rollout.workers={rollout.workers} x rollout.tensor_parallel={ranks}",
        )


def _overlap_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield what does not go with generation that overlaps with learning."""
    if config.ppo.importance_cap is None:
        yield Contradiction(
            ("rollout.max_staleness", "ppo.importance_cap"),
            "1 makes samples of the policy before the last update, which importance weights must correct; set "
            "ppo.importance_cap (2 is usual)",
        )
    if config.ray.placement == "colocated":
        yield Contradiction(
            ("ray.placement", "rollout.max_staleness"),
            "colocated engines sleep while the learner works, and with rollout.max_staleness=1 they sample: set apart",
        )
    if config.checkpoint.keep_best and config.checkpoint.keep_last == 1:
        yield Contradiction(
            ("checkpoint.keep_last", "rollout.max_staleness"),
            "1 removes a checkpoint before the score of its policy is known, with rollout.max_staleness=1; set 2 or "
            "more, or checkpoint.keep_best=false",
        )
