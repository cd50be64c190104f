"""Resources that the actors of each kind need, and the CPUs that they reserve."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ppo_ray.config import Config, in_job

Kind = Literal["rollout", "reward", "learner"]
KINDS: tuple[Kind, ...] = ("rollout", "reward", "learner")

PHASES = 3
"""Generation, scoring and learning take turns, so each reserves a third of a CPU for each of its threads. Where
generation overlaps with learning only generation and scoring do, beside the learner."""
PRECISION = 10_000
"""Ray counts resources in ten-thousandths."""
FORK_VARIABLE = "PPO_RAY_FORK"
"""Set for actors that may be forked off a process that has imported torch and transformers."""
FOLDER_VARIABLE = "PPO_RAY_FOLDER"
"""Names the folder that the run was started in, which relative paths start at; a job's workers start in theirs."""


def actor_name(kind: str, index: int) -> str:
    """Return the name of an actor, e.g. `rollout-0`: errors, logs and trajectories know it by that."""
    return f"{kind}-{index}"


@dataclass(frozen=True)
class ActorSpec:
    """The resources of one kind of actor."""

    key: str
    """The config section that sets them: `rollout`, `reward` or `learner`."""
    workers: int
    threads: int
    """CPU threads of each worker's processes."""
    gpus: float
    """GPUs of each worker, those of all its ranks; below 1 they share one."""
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    """Processes of each worker that share its model, each on a GPU of its own (tensor parallelism)."""
    turns: int = PHASES
    """Phases that take turns on the CPUs it uses; fewer where some are at work at the same time."""
    modules: tuple[str, ...] = ()
    """Python modules that `setup` will need, which each actor imports as soon as its process is there."""
    forks: bool = False
    """Whether a worker without GPUs may be forked off a process that has imported torch and transformers. Not if a
    user's code runs in it, which may want to set them up before they are imported, or torch's compiler."""

    @property
    def num_cpus(self) -> float:
        """CPUs each worker reserves."""
        return self.rank_cpus * self.ranks

    @property
    def rank_cpus(self) -> float:
        """CPUs each rank of a worker reserves."""
        return int(self.threads / self.turns * PRECISION) / PRECISION

    def options(self, name: str) -> dict[str, object]:
        """Return the `.options(...)` of one actor; Ray must not restart it by itself."""
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not in_job():
            environment[FOLDER_VARIABLE] = os.getcwd()
        if not self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asks for none
            if self.forks:
                environment |= CPU_ENVIRONMENT | {FORK_VARIABLE: "1"}
        return {
            "name": None,
            "num_cpus": self.num_cpus,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": {**environment, **self.environment, "PPO_RAY_WORKER": name}},
        }


def actor_specs(config: Config, kinds: Sequence[Kind] = KINDS) -> dict[str, ActorSpec]:
    """Return what the actors of some kinds need; their groups add environments and modules."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    ranks, turns = rollout.tensor_parallel, {"rollout": PHASES, "reward": PHASES, "learner": PHASES}
    if rollout.max_staleness:
        turns = {"rollout": 2, "reward": 2, "learner": 1}
    learner_forks = not (learner.compile or config.ppo.own_policy_loss)
    specs = {
        "rollout": ActorSpec("rollout", rollout.workers, rollout.threads, rollout.gpus * ranks, ranks=ranks),
        "reward": ActorSpec("reward", reward.workers, reward.threads, reward.gpus),
        "learner": ActorSpec("learner", learner.workers, learner.threads, learner.gpus, forks=learner_forks),
    }
    return {kind: replace(specs[kind], turns=turns[kind]) for kind in kinds}


def _prefer_jemalloc() -> dict[str, str]:
    """Return the environment of a process that allocates with jemalloc, of Ray's package; empty where it cannot.

    To align a tensor, glibc looks for more free memory than its size. So the gap that a tensor leaves is too small for
    the next one of that size. In a learner a quarter of glibc's memory was such gaps.
    """
    spec = find_spec("ray")  # which does not import it
    library = Path(spec.origin if spec and spec.origin else "").parent / "core" / "libjemalloc.so"
    # Arm's pages may be larger than those that it was built for; and who preloads a library has chosen one
    if platform.machine() != "x86_64" or "LD_PRELOAD" in os.environ or not library.is_file():
        return {}
    # the last option: by default a freed block is not split for what is smaller than a 64th of it (2^6, here 2^20), so
    # that a learner grew by up to a GiB per step
    options = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1,lg_extent_max_active_fit:20"
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": options}


CPU_ALLOCATION = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_ARENA_MAX": "1",  # actors work in threads, whose own arenas map and unmap every large tensor
    **_prefer_jemalloc(),
}
"""Environment variables by which glibc or jemalloc keeps freed pages: their first touch costs as much as their use."""

CPU_ENVIRONMENT = {
    # vLLM compiles its log-probability kernel even in eager mode: 10 s at the first call, nothing gained on a CPU
    "TORCH_COMPILE_DISABLE": "1",
    **CPU_ALLOCATION,
}
"""Environment variables of vLLM engines on a CPU, of workers that may be forked, and of the process that forks them.

They are read when a process starts, or when it imports torch.
"""
