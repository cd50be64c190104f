"""From the config to what each actor asks of Ray; refuses what cannot fit."""

from dataclasses import dataclass, field

import ray

from ppo_ray.config import Config
from ppo_ray.errors import InputError

_PHASES = 3
"""Generation, scoring and learning take turns, so each reserves a third of a CPU for each of its threads."""


@dataclass(frozen=True)
class ActorSpec:
    """What one kind of actor needs."""

    key: str
    """The config section that says so: `rollout`, `reward` or `learner`."""
    workers: int
    threads: int
    """CPU threads of each worker."""
    gpus: float
    """GPUs of each worker; below 1 they share one."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def num_cpus(self) -> float:
        """CPUs each worker reserves; Ray counts in ten-thousandths."""
        return int(self.threads / _PHASES * 10_000) / 10_000

    def options(self, name: str) -> dict[str, object]:
        """Return the `.options(...)` of one actor, which is never restarted behind its caller's back."""
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asks for none
        return {
            "name": None,
            "num_cpus": self.num_cpus,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": {**environment, **self.environment, "PPO_RAY_WORKER": name}},
        }


def rollout_spec(config: Config) -> ActorSpec:
    """Return what the rollout workers need; vLLM's environment must be set before their process imports it."""
    environment: dict[str, str] = {}
    if config.rollout.engine == "vllm":
        from ppo_ray.engines.vllm import CPU_ENVIRONMENT, ENVIRONMENT

        environment = ENVIRONMENT | ({} if config.rollout.gpus else CPU_ENVIRONMENT)
    return ActorSpec("rollout", config.rollout.workers, config.rollout.threads, config.rollout.gpus, environment)


def reward_spec(config: Config) -> ActorSpec:
    """Return what the reward workers need."""
    return ActorSpec("reward", config.reward.workers, config.reward.threads, config.reward.gpus)


def learner_spec(config: Config) -> ActorSpec:
    """Return what the learner needs; on a CPU it keeps freed pages, whose first touch costs as much as their use."""
    environment = (
        {}
        if config.learner.gpus
        else {
            "MALLOC_MMAP_THRESHOLD_": "4000000000",
            "MALLOC_TRIM_THRESHOLD_": "8000000000",
        }
    )
    return ActorSpec("learner", config.learner.workers, config.learner.threads, config.learner.gpus, environment)


def check_fit(specs: list[ActorSpec]) -> None:
    """Check that the connected cluster can hold all actors at once.

    Raises:
        InputError: it has fewer CPUs or GPUs than the actors reserve; names demand, supply and config keys.
    """
    supply = ray.cluster_resources()
    for resource, demand_of, option in (
        ("CPU", lambda spec: spec.workers * spec.num_cpus, "threads"),
        ("GPU", lambda spec: spec.workers * spec.gpus, "gpus"),
    ):
        demand = sum(demand_of(spec) for spec in specs)
        if demand > supply.get(resource, 0) + 1e-6:
            parts = ", ".join(
                f"{spec.key}: {spec.workers} x {getattr(spec, option):g} (reserves {demand_of(spec):g})"
                for spec in specs
            )
            raise InputError(
                f"the actors need {demand:g} {resource}s but Ray has {supply.get(resource, 0):g} ({parts}); "
                f"lower workers or {option} of these sections, or add nodes"
            )
