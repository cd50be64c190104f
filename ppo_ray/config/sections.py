"""The sections of a config that have no file of their own: the models, the machine, checkpoints."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ppo_ray.assets.cache import ASSETS, asset_path


def _resolve(source: str) -> str:
    """Turn `asset:NAME` into the asset's path in the cache and `~` into the home folder; leave the rest as it is."""
    prefix, colon, name = source.partition(":")
    if prefix == "asset" and colon:
        if name not in ASSETS:
            raise ValueError(f"{source!r} is no asset; there are {', '.join(f'asset:{asset}' for asset in ASSETS)}")
        return str(asset_path(name))
    return _expand(source)


def _expand(path: str) -> str:
    """Turn `~` into the home folder."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _resolve_folder(path: str) -> str:
    """Refuse `asset:NAME`, which would be a folder of that name; turn `~` into the home folder."""
    if path.startswith("asset:"):
        raise ValueError(f"{path!r} is an asset, which is only read; give a folder that the run may write to")
    return _expand(path)


Source = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]
"""A folder, a file, a hub name, or `asset:NAME` of what `ppo-ray assets` builds, e.g. asset:policy."""
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w./-]{0,199}$")]
"""A commit, tag or branch of a hub's repository."""
Folder = Annotated[str, Field(min_length=1), AfterValidator(_resolve_folder)]
"""A folder that is written to."""
DType = Literal["float32", "bfloat16"]
Transport = Literal["object_store", "nccl", "ipc"]
Quantization = Literal["nf4", "int8"]
"""bitsandbytes' codes of weights: 4 bits whose scales are quantised too, or 8 bits with a scale per row."""


@dataclass(frozen=True)
class Trust:
    """What of a model is trusted: which revision, and what its files may do beyond being read."""

    remote_code: bool = False
    """Run Python code that lies with the model."""
    pickles: bool = False
    """Load weights that are pickled, where there are no safetensors."""
    revision: str | None = None
    """Commit, tag or branch of a hub name; None: the newest commit, or a folder here."""

    @property
    def place(self) -> dict[str, str]:
        """The arguments that tell transformers which revision is meant."""
        return {} if self.revision is None else {"revision": self.revision}


def revision_problem(path: str, revision: str | None) -> str | None:
    """Say why a path has no such revision: it is a file or folder here; None: it may have it."""
    if revision is None or not (Path(path).exists() or path.startswith((".", "/"))):
        return None
    return f"revision={revision!r} is for a name on a hub, and {path} is a path here; leave it out"


NO_TRUST = Trust()


class Section(BaseModel):
    """A section of options."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
    refused: ClassVar[dict[str, str]] = {}
    """Options that people look for here and must not have, with the reason and what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _read_off(cls, options: Any) -> Any:
        """Take the word `off` for a word where an option has it: YAML reads it as false."""
        if not isinstance(options, dict):
            return options
        words = {name for name, field in cls.model_fields.items() if "off" in get_args(field.annotation)}
        return {name: "off" if name in words and value is False else value for name, value in options.items()}


class ModelSource(Section):
    """A section that names a model."""

    trust_remote_code: bool = False
    """Permission to run Python code that lies with the model, on every machine of the run. Only for models whose
    authors you trust with your account."""
    allow_pickled_weights: bool = False
    """Permission to load pickled weights (.bin) where there are no safetensors. Only for models you trust."""
    revision: Revision | None = None
    """Commit, tag or branch of `path`, where that is a hub name; null: its newest commit. A branch or tag may move; the
    hash of a commit names the same files for ever."""

    @property
    def trust(self) -> Trust:
        """What of the model at `path` is trusted."""
        return Trust(self.trust_remote_code, self.allow_pickled_weights, self.revision)


DEFAULT_RANK = 16
"""Of new adapters (LoRA)."""


class LoraConfig(Section):
    """Adapters of low rank (LoRA): with them the policy's own weights are frozen, and the adapters learn."""

    refused: ClassVar[dict[str, str]] = {
        "dropout": "not offered: PPO compares two passes over the same tokens, which dropout would make differ. Leave "
        "it out; it is off"
    }

    rank: int | None = Field(default=None, ge=1, le=512)
    """Rank of each adapter: A has as many rows, B as many columns. null: 16, or that of the adapters at `path`."""
    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scale: W + alpha / rank x B A. null: twice the rank, or that of the adapters at `path`."""
    targets: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Names of the linear maps that get adapters, or the ends of their names, e.g. [q_proj, v_proj]. null: all of them
    but the output embedding, or those of the adapters at `path`."""
    path: Source | None = None
    """Folder or hub name of adapters to begin with, as peft saves them, or a checkpoint of a run with LoRA. The
    reference is the policy without them. null: new ones, which change nothing at first."""

    @model_validator(mode="before")
    @classmethod
    def _drop_dropout(cls, options: Any) -> Any:
        """Take `dropout: 0` and `dropout: off` for what they are: nothing is asked for."""
        if isinstance(options, dict) and options.get("dropout", True) in (0, None):
            return {name: value for name, value in options.items() if name != "dropout"}
        return options


class ModelConfig(ModelSource):
    """The policy, and the frozen reference that it must not drift away from."""

    path: Source
    """Folder or hub name of the policy: a causal LM with its tokenizer, weights in safetensors. Required. TRL:
    `model_name`."""
    reference_path: Source | None = None
    """Folder or hub name of the reference; null: the policy as it starts. It must share the policy's vocabulary."""
    reference_revision: Revision | None = None
    """Commit, tag or branch of `reference_path`, as `revision`."""
    dtype: DType = "float32"
    """Precision that policy, critic and reference compute in, and of the weights that engines are sent. Under bfloat16
    the optimizer steps float32 master weights, which are what a checkpoint holds."""
    critic: Literal["shared", "separate"] = "shared"
    """Kind of value function: a linear head on the policy's last hidden state (shared), or a decoder of its own
    (separate)."""
    critic_path: Source | None = None
    """Folder or hub name of a separate critic's decoder, e.g. a reward model's. A value head in it is taken too. null:
    the critic that lies with the policy (`critic/` of a checkpoint), or else a copy of the policy."""
    critic_revision: Revision | None = None
    """Commit, tag or branch of `critic_path`, as `revision`."""
    lora: LoraConfig | None = None
    """Adapters that are trained instead of the policy's own weights; `{}` takes all defaults. null: all weights are
    trained. See docs/lora.md."""
    quantization: Quantization | None = None
    """Codes in which the frozen weights of linear maps are kept on a GPU, beside `lora` (QLoRA). nf4: 4 bits. int8: 8
    bits, for weights alone. Embeddings keep `dtype`. Engines get whole weights. null: weights of `dtype`. See
    docs/lora.md."""
    value_head_init: Literal["random", "zeros"] = "random"
    """Weights that a new value head begins with. random: as TRL's, which makes values of its own; zeros: no value is
    foreseen at first, so that advantages have less noise until the head has learnt. Not used where a head is loaded."""

    @property
    def reference(self) -> tuple[str, Trust]:
        """Where the reference is, and what of it is trusted."""
        if self.reference_path is None:
            return self.path, self.trust
        return self.reference_path, replace(self.trust, revision=self.reference_revision)

    @property
    def critic_source(self) -> tuple[str, Trust]:
        """The same of a separate critic's decoder."""
        if self.critic_path is None:
            return self.path, self.trust
        return self.critic_path, replace(self.trust, revision=self.critic_revision)


class RayConfig(Section):
    """The cluster."""

    address: str | None = None
    """Address of a running cluster, e.g. "auto" or "10.0.0.1:6379"; null: a local Ray, or in `ray job submit` the job's
    own."""
    placement: Literal["apart", "colocated"] = "apart"
    """Distribution of workers over GPUs. apart: every worker has its own. colocated: learner ranks and reward workers
    sit on the rollout workers' GPUs, each with an equal share, and engines sleep while the learner works. See
    docs/gpus.md."""
    object_store_mib: int = Field(default=2048, ge=80)
    """Shared memory of a local Ray's object store, MiB."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Time limit for the start of an actor, seconds: for room on the cluster, and for the loading of its model."""
    call_timeout_s: float = Field(default=1800.0, gt=0)
    """Time limit for a call of an actor, seconds; one that takes longer is taken for dead."""
    transfer_timeout_s: float = Field(default=300.0, gt=0)
    """Time limit for a weight sync by NCCL or CUDA IPC, and for the meeting of actors before it, seconds."""
    ping_timeout_s: float = Field(default=60.0, gt=0)
    """Time without an answer to a control call, seconds, after which an actor at work is taken for dead."""
    max_restarts: int = Field(default=3, ge=0)
    """Number of failed restarts in a row after which the run ends. A restart has failed if the actor dies again before
    it has done the work that it died at; a learner's, if the run has not made a step more than before."""
    stop_timeout_s: float = Field(default=120.0, gt=0)
    """Time limit for the end of a run after SIGTERM or Ctrl-C, seconds, the checkpoint included; then it is ended at
    once."""

    @property
    def is_private(self) -> bool:
        """Whether the run starts a Ray of its own: no address is given, and this process belongs to no cluster."""
        return self.address is None and not os.environ.get("RAY_ADDRESS") and not in_job()


def in_job() -> bool:
    """Say whether this process was started by `ray job submit`, which sets this variable."""
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


class CheckpointConfig(Section):
    """When the whole state of a run is written, and how much of it is kept."""

    every_steps: int = Field(default=10, ge=0)
    """Steps from one checkpoint to the next; 0: only at the end, and when the run is stopped."""
    keep_last: int = Field(default=2, ge=1)
    """Number of the newest checkpoints that are kept."""
    keep_best: bool = True
    """Whether the checkpoint whose policy was best is kept too, by `best_by`."""
    best_by: str = Field(default="score/mean", pattern=r"^(score/mean|eval/[^ ]+)$")
    """Figure that is highest for the best policy: `score/mean` of the step that it sampled, or a figure of its
    evaluation, e.g. `eval/score_mean` or `eval/pass@1`."""
