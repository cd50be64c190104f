"""TRL 0.11's PPOConfig: the same fields, defaults and derived values, and their translation into ppo_ray's options."""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, Literal

from ppo_ray import config as ppo_ray_config

_KL_ESTIMATORS: dict[str, Literal["k1", "k2", "abs", "full"]] = {"kl": "k1", "mse": "k2", "abs": "abs", "full": "full"}
_COUNTS = ("steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "compare_steps")
_ABOVE_0 = ("learning_rate", "target", "horizon", "cliprange", "cliprange_value", "target_kl", "ratio_threshold")
_LIMITS: tuple[tuple[tuple[str, ...], type, Callable[[Any], bool], str], ...] = (
    (_COUNTS, Integral, lambda value: value >= 1, "at least 1, a whole number"),
    (("seed",), Integral, lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1, a whole number (numpy's limit)"),
    (_ABOVE_0, Real, lambda value: 0 < value < math.inf, "above 0"),
    (("init_kl_coef", "vf_coef"), Real, lambda value: 0 <= value < math.inf, "at least 0"),
    (("gamma", "lam"), Real, lambda value: 0 <= value <= 1, "from 0 to 1"),
    (("max_grad_norm", "score_clip"), Real, lambda value: 0 < value < math.inf, "above 0, or None"),
)
"""Fields, their type, what their values must fulfil, and the same in words; those of the last row may be None."""


@dataclass
class PPOConfig:
    """Options of `PPOTrainer`, with ppo_ray's names in brackets; what cannot be honoured raises ValueError."""

    exp_name: str = os.path.basename(sys.argv[0]).removesuffix(".py")
    """Name of the experiment, for trackers: the script's."""
    seed: int = 0
    """Seed of `random`, numpy and torch, set when the trainer is made."""
    log_with: Literal["wandb", "tensorboard"] | None = None
    """Tracker that `log_stats` writes to, by way of accelerate."""
    task_name: str | None = None
    """For trackers only."""
    model_name: str = "gpt2"
    """For trackers, and for the script's own use."""
    query_dataset: str = "stanfordnlp/imdb"
    """For trackers only."""
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    """For trackers only."""
    remove_unused_columns: bool = True
    """Whether a data set's columns that neither the model nor the log takes are dropped."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tracker."""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to accelerate's Accelerator."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to accelerate's ProjectConfiguration, e.g. `logging_dir`."""
    tracker_project_name: str = "trl"
    """Project name for the tracker."""
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    """Cannot be honoured: call `push_to_hub` yourself."""
    steps: int = 20000
    """Determines `total_ppo_epochs` and nothing else, as in TRL."""
    learning_rate: float = 1.41e-5
    """Learning rate of Adam, if no optimizer is given [ppo.learning_rate]."""
    adap_kl_ctrl: bool = True
    """Adaptive or fixed KL controller [ppo.kl_controller]."""
    init_kl_coef: float = 0.2
    """First weight of the KL penalty [ppo.kl_coef]."""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """How the KL is estimated [ppo.kl_estimator: k1, abs, k2, full]."""
    target: float = 6.0
    """KL that the adaptive controller aims at, nats per sequence [ppo.kl_target]."""
    horizon: float = 10000.0
    """Horizon of the adaptive controller, sequences [ppo.kl_horizon]."""
    gamma: float = 1.0
    """Discount [ppo.gamma]."""
    lam: float = 0.95
    """Lambda of GAE [ppo.gae_lambda]."""
    cliprange: float = 0.2
    """Clip range of the policy's ratio [ppo.clip_range]."""
    cliprange_value: float = 0.2
    """Clip range of the values [ppo.value_clip_range]."""
    vf_coef: float = 0.1
    """Weight of the value loss [ppo.value_coef]."""
    batch_size: int = 128
    """Samples per `step` [rollout.batch_size]."""
    forward_batch_size: int | None = None
    """Deprecated: overrides mini_batch_size."""
    mini_batch_size: int = 128
    """Samples per forward and backward pass in TRL [ppo.minibatch_size / ppo.gradient_accumulation]."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step [ppo.gradient_accumulation]."""
    world_size: int | None = None
    """Filled in by the trainer: always 1. More processes: `ppo-ray train`."""
    ppo_epochs: int = 4
    """Passes over a batch [ppo.epochs]."""
    max_grad_norm: float | None = None
    """Gradient clipping [ppo.max_grad_norm]. TRL clipped its first optimizer step only; here all are clipped."""
    optimize_cuda_cache: bool | None = None
    """Deprecated: optimize_device_cache."""
    optimize_device_cache: bool = False
    """Whether a GPU's cached memory is freed after each step."""
    early_stopping: bool = False
    """Whether a step ends after an epoch whose KL exceeds 1.5 target_kl [ppo.early_stopping=after_epoch]."""
    target_kl: float = 1.0
    """KL of early stopping [ppo.early_stopping_kl]."""
    compare_steps: int = 1
    """For push_to_hub_if_best_kwargs; nothing else uses it."""
    ratio_threshold: float = 10.0
    """Mini-batches with a larger mean ratio are multiplied by zero [ppo.ratio_threshold, ppo.ratio_exceeded]."""
    use_score_scaling: bool = False
    """Divides scores by their running standard deviation [ppo.score_scaling=std]; it crashes in TRL 0.11.3."""
    use_score_norm: bool = False
    """Subtracts their running mean before [ppo.score_scaling=mean_std]."""
    score_clip: float | None = None
    """Limit of scores [ppo.score_clip]."""
    whiten_rewards: bool = False
    """Whether rewards are whitened, their mean kept [ppo.whiten_rewards=padded]."""
    gradient_checkpointing: bool = False
    """Cannot be honoured; TRL ran every pass in eval mode, where transformers ignores it."""
    is_encoder_decoder: bool | None = None
    """Filled in by the trainer: always False."""
    is_peft_model: bool | None = None
    """Filled in by the trainer: always False."""
    backward_batch_size: int | None = None
    """Derived: samples per optimizer step."""
    global_backward_batch_size: int | None = None
    """Filled in by the trainer."""
    global_batch_size: int | None = None
    """Filled in by the trainer."""
    dataset_num_proc: int | None = None
    """For the script's own use."""

    def __post_init__(self) -> None:
        """Check the options and derive others.

        Raises:
            ValueError: an option is out of bounds or cannot be honoured.
            ImportError: wandb is asked for and not installed.
        """
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size is deprecated; it overrides mini_batch_size", FutureWarning, stacklevel=3)
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            if self.optimize_device_cache:
                raise ValueError("optimize_cuda_cache is the old name of optimize_device_cache; give one of them")
            warnings.warn("optimize_cuda_cache is deprecated; use optimize_device_cache", FutureWarning, stacklevel=3)
            self.optimize_device_cache = self.optimize_cuda_cache
        wrong = [*self._find_out_of_bounds(), *self._find_not_honoured()]
        if wrong:
            raise ValueError("\n".join(wrong))
        if self.log_with == "wandb" and find_spec("wandb") is None:
            raise ImportError("log_with='wandb' needs wandb: pip install wandb")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size={self.mini_batch_size} x "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} = {self.backward_batch_size}: a batch "
                "is learnt from in whole optimizer steps; change one of the three"
            )
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def _find_out_of_bounds(self) -> Iterator[str]:
        """Yield a line for each value that its option cannot have."""
        for names, kind, fits, wanted in _LIMITS:
            for name in names:
                value = getattr(self, name)
                if value is None and wanted.endswith("None"):
                    continue
                if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
                    yield f"{name}={value!r} must be {wanted}"
        if self.kl_penalty not in _KL_ESTIMATORS:
            yield f"kl_penalty={self.kl_penalty!r} is not one of {', '.join(_KL_ESTIMATORS)}"
        if self.log_with not in (None, "wandb", "tensorboard"):
            yield f"log_with={self.log_with!r} is not one of wandb, tensorboard"

    def _find_not_honoured(self) -> Iterator[str]:
        """Yield a line for each option that is not offered, with what to do instead."""
        reasons = {
            "push_to_hub_if_best_kwargs": "look at stats['ppo/mean_scores'] and call push_to_hub yourself",
            "gradient_checkpointing": "it had no effect in TRL, where every pass ran in eval mode; leave it out",
            "is_encoder_decoder": "only causal language models are trained here",
            "is_peft_model": "the trainer sets it; adapters are made by from_pretrained(..., peft_config=...)",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                yield f"{name}={getattr(self, name)!r} cannot be honoured: {reason}"
        if self.world_size not in (None, 1):
            yield f"world_size={self.world_size} cannot be honoured: this is one process; see `ppo-ray train`"

    def to_dict(self) -> dict[str, Any]:
        """Return all options by name; nested ones are flattened, with slashes in their names."""
        return _flatten(self.__dict__)

    def to_ppo_ray(self) -> ppo_ray_config.UpdateConfig:
        """Return ppo_ray's options under which its learner computes what TRL computes."""
        scaling: Literal["none", "std", "mean_std"] = "mean_std" if self.use_score_norm else "std"
        return ppo_ray_config.UpdateConfig(
            learning_rate=float(self.learning_rate),
            epochs=int(self.ppo_epochs),
            minibatch_size=int(self.mini_batch_size * self.gradient_accumulation_steps),
            gradient_accumulation=int(self.gradient_accumulation_steps),
            loss_aggregation="microbatch_mean",
            gamma=float(self.gamma),
            gae_lambda=float(self.lam),
            clip_range=float(self.cliprange),
            value_clip_range=float(self.cliprange_value),
            value_coef=float(self.vf_coef),
            kl_estimator=_KL_ESTIMATORS[self.kl_penalty],
            kl_controller="adaptive" if self.adap_kl_ctrl else "fixed",
            kl_coef=float(self.init_kl_coef),
            kl_target=float(self.target),
            kl_horizon=float(self.horizon),
            score_scaling=scaling if self.use_score_scaling else "none",
            score_clip=None if self.score_clip is None else float(self.score_clip),
            whiten_rewards="padded" if self.whiten_rewards else "off",
            max_grad_norm=None if self.max_grad_norm is None else float(self.max_grad_norm),
            ratio_threshold=float(self.ratio_threshold),
            ratio_exceeded="zero_loss",
            early_stopping="after_epoch" if self.early_stopping else "off",
            early_stopping_kl=float(self.target_kl),
        )


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
