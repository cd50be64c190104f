"""PPO for language models as Ray actors.

The names in `__all__` are for programs that use the package; docs/api.md shows each at work. Each is imported when it
is first used, so `import ppo_ray` alone loads neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Completion",
    "Config",
    "Engine",
    "Evaluation",
    "GenerationRequest",
    "HFEngine",
    "InputError",
    "LearnerConfig",
    "ModelConfig",
    "PPOLearner",
    "PPORayError",
    "PromptBatch",
    "PromptStream",
    "PromptsConfig",
    "RewardFunction",
    "RunReport",
    "Sampling",
    "UpdateConfig",
    "UpdateReport",
    "VLLMEngine",
    "WorkerError",
    "check",
    "evaluate",
    "load_config",
    "train",
]

_HOMES = {
    "config": ("Config", "LearnerConfig", "ModelConfig", "PromptsConfig", "UpdateConfig", "load_config"),
    "errors": ("InputError", "PPORayError", "WorkerError"),
    "learner.learner": ("PPOLearner",),
    "learner.reports": ("UpdateReport",),
    "prompts.batch": ("PromptBatch",),
    "prompts.stream": ("PromptStream",),
    "reward.classifier": ("Classifier",),
    "reward.function": ("RewardFunction",),
    "rollout.engine": ("Completion", "Engine", "GenerationRequest", "Sampling"),
    "rollout.hf": ("HFEngine",),
    "rollout.vllm": ("VLLMEngine",),
    "run.evaluation": ("Evaluation",),
    "run.train": ("RunReport", "check", "evaluate", "train"),
}
"""The module that defines each name; the imports below, for type checkers, are the same."""

if TYPE_CHECKING:
    from ppo_ray.config import Config, LearnerConfig, ModelConfig, PromptsConfig, UpdateConfig, load_config
    from ppo_ray.errors import InputError, PPORayError, WorkerError
    from ppo_ray.learner.learner import PPOLearner
    from ppo_ray.learner.reports import UpdateReport
    from ppo_ray.prompts.batch import PromptBatch
    from ppo_ray.prompts.stream import PromptStream
    from ppo_ray.reward.classifier import Classifier
    from ppo_ray.reward.function import RewardFunction
    from ppo_ray.rollout.engine import Completion, Engine, GenerationRequest, Sampling
    from ppo_ray.rollout.hf import HFEngine
    from ppo_ray.rollout.vllm import VLLMEngine
    from ppo_ray.run.evaluation import Evaluation
    from ppo_ray.run.train import RunReport, check, evaluate, train
else:  # hidden from type checkers, which would take any misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for."""
        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names too, those that are not imported yet included."""
    return sorted({*globals(), *__all__})
