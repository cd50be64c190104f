"""Every option of a run: typed, frozen, documented; what a YAML file and `key=value` overrides are read into.

Defaults are TRL 0.11's where TRL has the option; its name follows "TRL:".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ppo_ray.assets.cache import asset_path
from ppo_ray.config_file import Contradiction, Contradictions, load

_ASSETS: tuple[Literal["policy", "classifier", "prompts"], ...] = ("policy", "classifier", "prompts")


def _resolve(source: str) -> str:
    """Turn `asset:NAME` into the asset's path in the cache and `~` into the home folder; leave the rest as it is."""
    prefix, colon, name = source.partition(":")
    if prefix == "asset" and colon:
        for asset in _ASSETS:
            if name == asset:
                return str(asset_path(asset))
        raise ValueError(f"{source!r} is no asset; there are {', '.join(f'asset:{asset}' for asset in _ASSETS)}")
    return str(Path(source).expanduser()) if source.startswith("~") else source


Source = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]
"""A folder, a file, a hub name, or `asset:policy`, `asset:classifier`, `asset:prompts` (`ppo-ray assets imdb`)."""
DType = Literal["float32", "bfloat16"]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class ModelConfig(_Section):
    """The policy, and the frozen reference that it must not drift away from."""

    path: Source
    """Folder or hub name of a causal LM with its tokenizer, weights in safetensors. Required. TRL: `model_name`."""
    reference_path: Source | None = None
    """The same of the reference; null: the policy as it starts. It must share the policy's vocabulary."""
    dtype: DType = "float32"
    """Of the learner's weights."""


class PromptsConfig(_Section):
    """The texts whose first tokens are the prompts."""

    path: Source
    """A .parquet, .jsonl or .csv file, a folder, or a hub data set name. Required. TRL: `query_dataset`."""
    split: str = "train"
    """Split of a folder or hub data set; a single file is taken whole."""
    column: str = "text"
    """The column that holds the texts."""
    min_chars: int = Field(default=200, ge=0)
    """Only texts LONGER than this many characters are used; the others are dropped."""
    min_tokens: int = Field(default=2, ge=1)
    """Shortest prompt, in tokens, inclusive. A shorter text is used whole. TRL: `LengthSampler(min_value)`."""
    max_tokens: int = Field(default=8, ge=1)
    """Longest prompt, in tokens, INCLUSIVE (TRL's `LengthSampler(2, 8)` is half-open and never draws 8)."""
    shuffle: bool = True
    """Draw a new order each epoch from the run's seed; false: the order of the data set, every time."""


class RolloutConfig(_Section):
    """Generation: how many workers, and how they sample."""

    engine: Literal["vllm", "hf"] = "vllm"
    """vLLM, or transformers where vLLM cannot be installed (slow)."""
    workers: int = Field(default=1, ge=1)
    """Rollout actors; each holds the whole policy and takes an equal share of the batch."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per worker. workers x threads must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker; a fraction lets actors share one."""
    batch_size: int = Field(default=128, ge=1)
    """Responses a step, over all workers. TRL: `batch_size`."""
    min_response_tokens: int = Field(default=4, ge=1)
    """Smallest limit that a response is given, in tokens, inclusive; an end of sequence may still come earlier."""
    max_response_tokens: int = Field(default=16, ge=1)
    """Largest limit that a response is given, in tokens, INCLUSIVE (TRL's `LengthSampler(4, 16)` never draws 16)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, from the full softmax. The learner's log-probabilities are taken at the same temperature."""
    stop_at_eos: bool = True
    """Whether an end-of-sequence token ends a response; false: every response has its full length."""
    max_context: int = Field(default=512, ge=2)
    """Longest prompt plus response that an engine has room for, in tokens."""
    kv_cache_mib: int = Field(default=512, ge=1)
    """Memory of each vLLM engine for keys and values, MiB."""
    dtype: DType = "float32"
    """Of the engines' weights. bfloat16 is faster on GPUs; log-probabilities are then up to 0.4 off the learner's."""


class RewardConfig(_Section):
    """What scores prompt plus response: either a classifier (`path`) or a Python function (`function`)."""

    path: Source | None = None
    """Folder or hub name of a sequence classifier with its tokenizer, weights in safetensors. TRL: `reward_model`."""
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    """A Python function instead, as "package.module:function"; called with a list of prompts and one of responses, it
    returns a score (or None) for each pair."""
    label: str = "POSITIVE"
    """The classifier's label, by name, whose output is the score."""
    transform: Literal["logit", "softmax", "sigmoid"] = "logit"
    """What makes a score of the classifier's outputs: the label's raw output, its probability, or its own sigmoid."""
    workers: int = Field(default=1, ge=1)
    """Reward actors; each scores the shards it is given."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per worker. workers x threads must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker; a fraction lets actors share one."""
    batch_size: int = Field(default=32, ge=1)
    """Texts a forward of the classifier."""


class PPOConfig(_Section):
    """The update."""

    learning_rate: float = Field(default=1.41e-5, gt=0)
    """Of Adam, constant. TRL: `learning_rate`."""
    epochs: int = Field(default=4, ge=1)
    """Passes over a step's trajectories. TRL: `ppo_epochs`."""
    minibatch_size: int | None = Field(default=None, ge=1)
    """Trajectories an optimizer step; must divide rollout.batch_size; null: all of them. TRL: `mini_batch_size`."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token. TRL: `gamma`."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Of generalised advantage estimation: 0 trusts the values, 1 the rewards. TRL: `lam`."""
    clip_range: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may leave 1 before its gradient is cut. TRL: `cliprange`."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """How far a value may leave the old one before its gradient is cut, in the score's unit. TRL: `cliprange_value`."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss. TRL: `vf_coef`."""
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    """Whether kl_coef follows the measured KL towards kl_target, or stays. TRL: `adap_kl_ctrl`."""
    kl_coef: float = Field(default=0.2, ge=0)
    """Weight of the KL penalty in the reward (the first one, if adaptive). TRL: `init_kl_coef`."""
    kl_target: float = Field(default=6.0, gt=0)
    """KL to the reference that the adaptive controller aims at, in nats summed over a sequence. TRL: `target`."""
    kl_horizon: float = Field(default=10000.0, gt=0)
    """Trajectories over which the adaptive controller corrects itself. TRL: `horizon`."""
    whiten_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over a step's tokens. TRL does so always."""
    whiten_rewards: bool = False
    """Whether rewards get variance 1, their mean kept. TRL: `whiten_rewards`."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longest gradient of an optimizer step, global L2 norm; null: not clipped. TRL: `max_grad_norm`."""
    ratio_threshold: float = Field(default=10.0, gt=1)
    """A mini-batch whose mean probability ratio exceeds this is skipped. TRL: `ratio_threshold`."""


class LearnerConfig(_Section):
    """Where the update runs."""

    threads: int = Field(default=2, ge=1)
    """CPU threads of the learner. Must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of the learner; a fraction lets it share one."""
    microbatch_tokens: int = Field(default=1024, ge=1)
    """Prompt and response tokens, padding included, a forward; trades memory for speed, never changes the gradient."""


class EvaluationConfig(_Section):
    """Held-out prompts, the same for every run seed, scored before and after training."""

    num_prompts: int = Field(default=256, ge=0)
    """How many prompts are held out; 0: none, and nothing is evaluated."""
    num_samples: int = Field(default=16, ge=0)
    """How many of them are shown in samples.md."""


class RayConfig(_Section):
    """The cluster."""

    address: str | None = None
    """Of a running cluster, e.g. "auto" or "10.0.0.1:6379"; null: a local Ray, or in `ray job submit` the job's own."""
    object_store_mib: int = Field(default=2048, ge=80)
    """Shared memory of a local Ray's object store, MiB."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest start of an actor, seconds: placement, loading of its model."""
    call_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest call of an actor, seconds."""


class Config(_Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything random in the run, held-out prompts excepted. TRL: `seed`."""
    steps: int = Field(default=100, ge=1)
    """Cycles of generation, scoring, update and weight broadcast. TRL: `steps` counts responses instead."""
    output_dir: Source
    """Folder that the run writes to; it must not hold another run. Required."""
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

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
    ppo, evaluation = config.ppo, config.evaluation
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
    refuse_unless(
        ppo.minibatch_size is None or rollout.batch_size % ppo.minibatch_size == 0,
        ("ppo.minibatch_size", "rollout.batch_size"),
        f"{ppo.minibatch_size} does not divide rollout.batch_size={rollout.batch_size}",
    )
    refuse_unless(
        (reward.path is None) != (reward.function is None),
        ("reward.path", "reward.function"),
        "give reward.path (a classifier) or reward.function (a Python function), "
        + ("one of them" if reward.path is None else "not both"),
    )
    refuse_unless(
        evaluation.num_samples <= evaluation.num_prompts or evaluation.num_prompts == 0,
        ("evaluation.num_samples", "evaluation.num_prompts"),
        f"{evaluation.num_samples} exceeds evaluation.num_prompts={evaluation.num_prompts}",
    )
    return found
