"""The group of all reward workers: what the loop calls `actors.reward`."""

import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import Seats
from ppo_ray.actors.shards import Shards
from ppo_ray.config import Config
from ppo_ray.events import Report
from ppo_ray.plan import ActorSpec
from ppo_ray.plan.demand import actor_specs
from ppo_ray.reward.actor import RewardWorker
from ppo_ray.reward.judge import StartJudge


def reward_spec(config: Config) -> ActorSpec:
    """Return the resources of the reward workers."""
    loads_model = any(source.path for _, source in config.reward.sources)
    modules = ("ppo_ray.reward.classifier",) if loads_model else ()
    only_models = all(source.path for _, source in config.reward.sources)
    return replace(actor_specs(config)["reward"], modules=modules, forks=only_models)


class RewardGroup:
    """All reward workers."""

    def __init__(
        self,
        config: Config,
        report: Report,
        seats: Seats | None = None,
        worker: Any = RewardWorker,
        *,
        start_judge: StartJudge | None = None,
        environment: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        """Create the workers, actors of a class; `setup` loads their classifiers.

        Args:
            config: of the run.
            report: is told when a worker is replaced.
            seats: of the workers; None: anywhere.
            worker: the class.
            start_judge: loads a judge, in a worker; None: there is none.
            environment: variables that a judge's engine reads when it is imported.
        """
        self._setup = (config,) if start_judge is None else (config, start_judge)
        self._config = config
        spec = replace(reward_spec(config), environment=dict(environment))
        self._group = ActorGroup(worker, spec, config.ray, report, seats)

    def setup(self) -> list[dict[str, float]]:
        """Load all classifiers at once and wait until they are ready."""
        return self._group.setup(*self._setup)

    def score(self, trajectories: Shards) -> Shards:
        """Score shards, each as soon as it is there; returns at once."""
        calls = [lambda handle, table: handle.score.remote(table)] * len(trajectories.tables)
        return Shards(self._group, "scoring", calls, self._config.ray.call_timeout_s, source=trajectories)

    def summarize(self, scored: Shards, num_rows: int) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Wait for all shards' figures, and for prompt, response and score of the first `num_rows` rows.

        See `RewardWorker.summarize`.
        """
        doing = "summarizing"
        return scored.use(
            lambda tables: self._group.call_first(doing, lambda handle: handle.summarize.remote(num_rows, *tables))
        )

    def count_flat(self, scored: Shards) -> int:
        """Wait for all shards, and count the groups whose scores are all equal; see `trajectory.find_flat`."""
        doing = "counting flat groups"
        return scored.use(
            lambda tables: self._group.call_first(doing, lambda handle: handle.count_flat.remote(*tables))
        )

    def explain(self) -> str:
        """Return a worker's own words why a text has no score: of the last one that it could not score."""
        reasons = self._group.call("explaining", lambda handle: handle.explain.remote())
        named = zip(self._group.members, reasons, strict=True)
        return next((f"{member.name}: {reason}" for member, reason in named if reason), "see the reward worker's log")

    def close(self) -> None:
        """End the workers."""
        self._group.close()
