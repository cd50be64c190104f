"""All actors of a run: started in order, closed whatever happens."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ppo_ray.actors.learner import LearnerGroup
from ppo_ray.actors.placement import check_fit, learner_spec, reward_spec, rollout_spec
from ppo_ray.actors.reward import RewardGroup
from ppo_ray.actors.rollout import RolloutGroup
from ppo_ray.config import Config


@dataclass(frozen=True)
class Actors:
    """What the loop calls."""

    rollout: RolloutGroup
    reward: RewardGroup
    learner: LearnerGroup


@contextlib.contextmanager
def launch_scorers(config: Config, say: Callable[[str], None]) -> Iterator[tuple[RolloutGroup, RewardGroup]]:
    """Start rollout and reward workers, as an evaluation needs them.

    Engines start first and alone: they take longest and fill the cores. `say` is told when a group is ready.

    Raises:
        InputError: the cluster cannot hold them.
        WorkerError: a worker did not start; the message is its own error.
    """
    check_fit([rollout_spec(config), reward_spec(config)])
    with contextlib.ExitStack() as stack:
        rollout = RolloutGroup(config)
        stack.callback(rollout.close)
        _say_ready(say, f"{config.rollout.workers} x rollout ({config.rollout.engine})", rollout.setup())
        reward = RewardGroup(config)
        stack.callback(reward.close)
        _say_ready(say, f"{config.reward.workers} x reward", reward.setup())
        yield rollout, reward


@contextlib.contextmanager
def launch(config: Config, trajectories: Path, say: Callable[[str], None]) -> Iterator[Actors]:
    """Start all actors of a training run, with the learner's weights in every engine; see `launch_scorers`."""
    check_fit([rollout_spec(config), reward_spec(config), learner_spec(config)])
    with launch_scorers(config, say) as (rollout, reward), contextlib.ExitStack() as stack:
        learner = LearnerGroup(config, trajectories)
        stack.callback(learner.close)
        _say_ready(say, "learner", learner.setup())
        synced = rollout.load_weights(learner.weights())
        say(f"weights of policy version 0 in every engine, verified, in {synced['time/sync_s']:.1f} s")
        yield Actors(rollout, reward, learner)


def _say_ready(say: Callable[[str], None], who: str, answers: list[dict[str, float]]) -> None:
    say(f"{who} ready in {max(seconds for answer in answers for seconds in answer.values()):.1f} s")
