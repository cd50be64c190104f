"""The loop that takes further prompts in the place of flat groups, over actors that are plain objects."""

import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ppo_ray import checkpoint
from ppo_ray.actors.shards import Rounds
from ppo_ray.actors.watch import DependencyLost
from ppo_ray.checkpoint import Pending, RunState
from ppo_ray.config import load_config
from ppo_ray.errors import WorkerLost
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.run.loop import run_with_refills
from ppo_ray.run.run import Run
from ppo_ray.run.train import rebuild_on_loss, save_on_exit
from tests.run.test_loop import metrics

GROUPS, SIZE, STEPS = 4, 2, 5


def is_flat(prompt: int) -> bool:
    return prompt % 3 == 1


def is_strange(prompt: int) -> bool:
    """The tokenizer makes no prompt of it."""
    return prompt % 7 == 5


@dataclass
class Prompts:
    position: int = 0
    fingerprint: str = "f00"
    summary: str = "prompts"

    def take(self, n: int, may_be_none: bool = False) -> SimpleNamespace:
        assert n % SIZE == 0
        first, self.position = self.position, self.position + n // SIZE
        asked = range(first, self.position)
        kept = [prompt for prompt in asked if not is_strange(prompt)]
        assert kept or may_be_none
        return SimpleNamespace(sample_ids=kept, num_skipped=len(asked) - len(kept))


@dataclass
class Made:
    """What stands for `Shards`: the groups that were sampled."""

    tables: list[Any]

    def wait(self, may_stop: bool = True) -> dict[str, float]:
        return {"time/generate_s": 2.0, "time/sync_s": 0.5}


@dataclass
class World:
    """Engines, rewards and a learner."""

    folder: Path
    lost: Iterator[bool] = field(default_factory=lambda: iter(()))
    learnt: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    last_update: UpdateReport | None = None

    def generate(self, prompts: SimpleNamespace, step: int, keep_weights: bool) -> Made:
        assert keep_weights  # the same engines may be asked for more
        return Made([prompts.sample_ids])

    def score(self, made: Made) -> Made:
        return made

    def count_flat(self, made: Made) -> int:
        return sum(is_flat(prompt) for prompt in made.tables[0])

    def explain(self) -> str:
        return ""

    def may_die(self) -> None:
        if next(self.lost, False):
            raise WorkerLost("gone", "learner-0")

    def update(self, scored: Rounds, step: int) -> UpdateReport:
        self.may_die()
        found: Mapping[str, float] = scored.wait()
        sampled = scored.use(lambda tables: [prompt for table in tables for prompt in table])
        assert step == len(self.learnt)
        self.learnt.append([prompt for prompt in sampled if not is_flat(prompt)])
        assert found["time/sync_s"] == 0.5
        self.seconds.append(found["time/generate_s"])
        self.last_update = UpdateReport(step, metrics(step, step) | dict(found), 0.2)
        return self.last_update

    def publish(self) -> int:
        self.may_die()
        return 0

    def load_weights(self, version: int) -> float:
        return 0.0

    def save(self, path: Path, state: RunState, config: str) -> Pending:
        learnt = json.dumps(self.learnt)
        return Pending(lambda: checkpoint.write(path, state, config, lambda folder: self.write(folder, learnt)))

    def write(self, folder: Path, learnt: str) -> None:
        (folder / "learnt.json").write_text(learnt)

    def rebuild(self, lost: WorkerLost, path: Path | None) -> None:
        self.restore(path)

    def restore(self, path: Path | None) -> None:
        self.last_update = None
        self.learnt = json.loads((path / "learnt.json").read_text()) if path else []


def train(world: World, steps: int = STEPS, resume: str = "never", *options: str) -> Run:
    options = (
        *("model.path=m", "prompts.path=p", "reward.path=r", f"output_dir={world.folder}", f"steps={steps}"),
        *(f"rollout.batch_size={GROUPS * SIZE}", f"rollout.responses_per_prompt={SIZE}", "checkpoint.every_steps=2"),
        *("rollout.flat_groups=refill", "ray.max_restarts=99", f"resume={resume}", *options),
    )
    prompts: Any = Prompts()
    actors: Any = SimpleNamespace(rollout=world, reward=world, learner=world)
    with Run.open(load_config(None, options), Console(file=io.StringIO()), prompts) as run:
        world.restore(run.start.checkpoint)
        with save_on_exit(run, actors):
            rebuild_on_loss(run, actors, run_with_refills)
    return run


def test_a_step_learns_from_a_full_batch_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    world = World(tmp_path)
    run = train(world, 2)
    # 0 1 2 3: 1 is flat. 4 is flat. 5 is strange. 6 is whole. Then 7 8 9 10: 7 and 10 are flat; 11 12: 12 is strange
    assert world.learnt == [[0, 2, 3, 6], [8, 9, 11, 14]]
    assert [line["groups/num_refilled"] for line in run.history] == [3, 4]
    assert run.state.prompt_position == run.prompts.position == 15
    assert world.seconds == [2.0 * 3, 2.0 * 4]  # the seconds of all rounds that sampled


def test_the_number_of_refills_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path)
    run = train(world, 1, "never", "rollout.max_refills=1")
    assert world.learnt == [[0, 2, 3]] and run.state.prompt_position == 5


def test_a_run_that_goes_on_learns_the_same(tmp_path: Path) -> None:
    train(World(tmp_path), 3)
    world = World(tmp_path)
    run = train(world, STEPS, "required")
    other = World(tmp_path / "other")
    whole = train(other, STEPS)
    assert world.learnt == other.learnt and run.state == whole.state
    assert all(len(groups) == GROUPS for groups in world.learnt)


@settings(deadline=None, max_examples=20)
@given(lost=st.lists(st.booleans(), max_size=20))
def test_whatever_is_lost_the_policy_learns_the_same(lost: list[bool]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, world = World(Path(folder) / "whole"), World(Path(folder) / "lossy", iter(lost))
        states = [train(one).state for one in (whole, world)]
        assert world.learnt == whole.learnt and states[0] == states[1]


@dataclass
class Lossy(Made):
    """Tables that are lost with their node until they have been made again."""

    remade: int = 0

    def remake(self) -> None:
        self.remade += 1


def test_tables_of_any_round_that_are_lost_before_they_are_read_are_made_again() -> None:
    rounds = [Lossy([1, 2]), Lossy([3])]

    def consume(tables: list[int]) -> int:
        if rounds[1].remade < 2:
            raise DependencyLost("a node is gone", "reward-0")
        return sum(tables)

    together: Any = rounds
    assert Rounds(together, {"groups/num_refilled": 1.0}).use(consume) == 6
    assert [one.remade for one in rounds] == [2, 2]
