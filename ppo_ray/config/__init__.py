"""Every option of a run, defined by section and joined in `run.py`; `file.py` reads them."""

from ppo_ray.config.evaluation import load_evaluation_config
from ppo_ray.config.learner import LearnerConfig
from ppo_ray.config.ppo import UpdateConfig
from ppo_ray.config.prompts import SOURCE, EvaluationConfig, EvaluationSet, PromptsConfig
from ppo_ray.config.reward import JudgeConfig, RewardConfig, RewardSource, is_loopback
from ppo_ray.config.rollout import RolloutConfig
from ppo_ray.config.run import Config, load_config, to_yaml
from ppo_ray.config.sections import (
    DEFAULT_RANK,
    NO_TRUST,
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    Quantization,
    RayConfig,
    Transport,
    Trust,
    in_job,
    revision_problem,
)
from ppo_ray.config.tracking import TrackingConfig, tracking_problems
from ppo_ray.config.transport import transport_problems, weight_transport

__all__ = [
    "DEFAULT_RANK",
    "NO_TRUST",
    "SOURCE",
    "CheckpointConfig",
    "Config",
    "EvaluationConfig",
    "EvaluationSet",
    "JudgeConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptsConfig",
    "Quantization",
    "RayConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutConfig",
    "TrackingConfig",
    "Transport",
    "Trust",
    "UpdateConfig",
    "in_job",
    "is_loopback",
    "load_config",
    "load_evaluation_config",
    "revision_problem",
    "to_yaml",
    "tracking_problems",
    "transport_problems",
    "weight_transport",
]
