"""All actors of a run: started in order, closed whatever happens."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppo_ray.actors.fork_server import fork_server
from ppo_ray.actors.placement import Seats, reserve
from ppo_ray.config import Config
from ppo_ray.events import Report
from ppo_ray.learner.group import LearnerGroup
from ppo_ray.plan.demand import KINDS, Kind
from ppo_ray.reward.group import RewardGroup
from ppo_ray.rollout.group import RolloutGroup
from ppo_ray.rollout.judge import judge_environment, start_judge

Say = Callable[[str], None]
"""Shows a line to whoever started the run."""


@dataclass(frozen=True)
class Actors:
    """The three groups of actors that the loop calls."""

    rollout: RolloutGroup
    reward: RewardGroup
    learner: LearnerGroup


def start_imports(config: Config, kinds: Sequence[Kind] = KINDS) -> contextlib.AbstractContextManager[None]:
    """For the length of a block, import what workers on CPUs need, in a process that will fork those of a private Ray.

    The block checks the inputs first, which takes as long and keeps one core busy.
    """
    uses_cpus = not config.rollout.gpus or ("learner" in kinds and not config.learner.gpus)
    return fork_server(at_once=True) if config.ray.is_private and uses_cpus else contextlib.nullcontext()


@contextlib.contextmanager
def launch_scorers(config: Config, say: Say, report: Report) -> Iterator[tuple[RolloutGroup, RewardGroup]]:
    """Start rollout and reward workers, as an evaluation needs them.

    Args:
        config: of the run.
        say: is told when a group is ready.
        report: is told when a worker is replaced.

    Raises:
        InputError: the cluster cannot hold them.
        WorkerError: a worker did not start; the message is its own error.
    """
    with reserve(config, ["rollout", "reward"]) as seats, contextlib.ExitStack() as stack:
        rollout, reward = _create_scorers(config, report, seats, stack)
        _set_up_scorers(config, rollout, reward, say)
        yield rollout, reward


@contextlib.contextmanager
def launch(
    config: Config, trajectories: Path | None, checkpoint: Path | None, say: Say, report: Report
) -> Iterator[Actors]:
    """Start all actors of a training run; see `launch_scorers`.

    Args:
        config: of the run.
        trajectories: folder of the Parquet files; None: nothing is to be updated.
        checkpoint: what the learner goes on from; None: the models that the config names.
        say: is told when a group is ready.
        report: is told when a worker is replaced.
    """
    with reserve(config) as seats, contextlib.ExitStack() as stack:
        rollout, reward = _create_scorers(config, report, seats, stack)
        learner = LearnerGroup(config, trajectories, report, seats)
        stack.callback(learner.close)
        _set_up_scorers(config, rollout, reward, say)
        _say_ready(say, "learner", learner.setup(checkpoint))
        yield Actors(rollout, reward, learner)


def _create_scorers(
    config: Config, report: Report, seats: Seats, stack: contextlib.ExitStack
) -> tuple[RolloutGroup, RewardGroup]:
    """Create the workers: all import their libraries at once; their models are loaded later, in turn."""
    rollout = RolloutGroup(config, report, seats)
    stack.callback(rollout.close)
    environment = judge_environment(config)
    reward = RewardGroup(config, report, seats, start_judge=start_judge, environment=environment)
    stack.callback(reward.close)
    return rollout, reward


def _set_up_scorers(config: Config, rollout: RolloutGroup, reward: RewardGroup, say: Say) -> None:
    """Set up the engines first and alone: they take longest and use all cores."""
    _say_ready(say, f"{config.rollout.workers} x rollout ({config.rollout.engine})", rollout.setup())
    if limits := rollout.describe_limits():
        say(f"Warning: {limits}")
    _say_ready(say, f"{config.reward.workers} x reward", reward.setup())


def _say_ready(say: Say, who: str, answers: list[dict[str, float]]) -> None:
    say(f"{who} ready in {max(seconds for answer in answers for seconds in answer.values()):.1f} s")
