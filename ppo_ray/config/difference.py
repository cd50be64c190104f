"""How two configs differ, and which differences a run may go on with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ppo_ray.config.run import Config

MAY_CHANGE = (
    *("steps", "output_dir", "resume", "checkpoint.*", "ray.*", "evaluation.num_samples"),
    *("rollout.workers", "rollout.threads", "rollout.gpus", "rollout.tensor_parallel", "rollout.kv_cache_mib"),
    *("rollout.self_check", "rollout.weight_transport", "rollout.weight_bucket_mib"),
    *("reward.workers", "reward.threads", "reward.gpus", "reward.batch_size"),
    *("learner.workers", "learner.threads", "learner.gpus", "learner.microbatch_tokens"),
    *("learner.sharding", "learner.gradient_checkpointing"),
)
"""Options that say how long, how often and on what a run works, not what it computes. Where they move work to other
hardware or other numbers of threads, floating-point sums may round otherwise."""


@dataclass(frozen=True)
class Difference:
    """An option that two configs give different values."""

    key: str
    before: Any
    after: Any

    @property
    def may_change(self) -> bool:
        """Whether a run may go on with it."""
        section = self.key.rpartition(".")[0]
        return self.key in MAY_CHANGE or f"{section}.*" in MAY_CHANGE

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


def differences(before: Config, after: Config) -> list[Difference]:
    """Return what differs, in the order of the config."""
    old, new = dict(_leaves(before.model_dump())), dict(_leaves(after.model_dump()))
    return [Difference(key, old[key], new[key]) for key in new if old[key] != new[key]]


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
