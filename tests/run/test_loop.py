"""Both loops over actors that are plain objects: who is asked for what, and by which weights it is done."""

import gc
import io
import json
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ppo_ray import __version__, checkpoint
from ppo_ray.checkpoint import AHEAD, Pending, RunState
from ppo_ray.config import load_config
from ppo_ray.errors import WorkerError, WorkerLost
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.run.loop import run_overlapped, run_steps
from ppo_ray.run.run import Run
from ppo_ray.run.train import rebuild_on_loss, save_on_exit

BATCH, STEPS = 4, 6


@dataclass
class Prompts:
    """Every third step has a prompt that cannot be used."""

    position: int = 0
    fingerprint: str = "f00"
    summary: str = "prompts"

    def take(self, n: int) -> SimpleNamespace:
        first, self.position = self.position, self.position + n
        return SimpleNamespace(first=first, num_skipped=int(first // n % 3 == 2))


@dataclass
class World:
    """Engines and a learner; a batch is `[step, first sample, policy version that sampled it]`."""

    folder: Path
    lose_learner: Iterator[bool] = field(default_factory=lambda: iter(()))
    """Whether the learner dies in its next call."""
    sample_late: Iterator[bool] = field(default_factory=lambda: iter(()))
    """Whether what a generation made is lost, so that it is made again when it is needed."""
    write_late: Iterator[bool] = field(default_factory=lambda: iter(()))
    """Whether a checkpoint is written when the next step has ended already."""
    calls: list[str] = field(default_factory=list)
    engines: int = 0
    """Policy version that they serve."""
    learnt: list[list[int]] = field(default_factory=list)
    """What the policy has learnt from: it stands for the weights."""
    held: list[int] | None = None
    last_update: UpdateReport | None = None
    last_sync: int = -1
    """The engines fail for good when they have this policy version and are sent another."""

    def generate(self, prompts: SimpleNamespace, step: int) -> Callable[[], list[int]]:
        self.calls.append(f"generate {step}")
        now = [step, prompts.first, self.engines]
        again = next(self.sample_late, False)
        return lambda: [step, prompts.first, self.engines] if again else now

    def load_weights(self, version: int) -> float:
        self.may_end()
        self.calls.append(f"load {version}")
        self.engines = version
        return 0.0

    def may_end(self) -> None:
        if self.engines == self.last_sync:
            raise WorkerError("rollout-0 was lost too often")

    def may_die(self) -> None:
        if next(self.lose_learner, False):
            raise WorkerLost("gone", "learner-0")

    def hold(self, scored: Callable[[], list[int]], may_stop: bool = False) -> None:
        self.may_die()
        self.held = scored()
        self.calls.append(f"hold {self.held[0]}")

    def update(self, scored: Callable[[], list[int]], step: int) -> UpdateReport:
        self.held = scored()
        return self.update_held(step)

    def update_held(self, step: int) -> UpdateReport:
        self.may_die()
        assert self.held is not None and self.held[0] == step == len(self.learnt)
        self.calls.append(f"update {step}")
        self.learnt.append(self.held)
        version, self.held = self.held[2], None
        self.last_update = UpdateReport(step, metrics(step, version), 0.2)
        return self.last_update

    def save(self, path: Path, state: RunState, config: str) -> Pending:
        self.may_die()
        assert state == RunState(len(self.learnt), BATCH * len(self.learnt), "f00")
        self.calls.append(f"save {state.step}")
        learnt, held = list(self.learnt), self.held

        def save_learner(folder: Path) -> None:
            (folder / "learnt.json").write_text(json.dumps(learnt))
            (folder / AHEAD).write_text(json.dumps(held))

        done = not next(self.write_late, False)  # what is written late is waited for before the next one, or at the end
        return Pending(lambda: checkpoint.write(path, state, config, save_learner), lambda: done)

    def publish(self) -> int:
        self.may_die()
        return len(self.learnt)

    def rebuild(self, lost: WorkerLost, path: Path | None) -> None:
        self.calls.append(f"rebuild from {path.name if path else 'nothing'}")
        self.restore(path)

    def restore(self, path: Path | None) -> None:
        self.last_update = None
        self.learnt = json.loads((path / "learnt.json").read_text()) if path else []
        self.held = json.loads((path / AHEAD).read_text()) if path else None


class Reward:
    """Scores nothing itself: the world's learner says what a step's score is."""

    def score(self, shards: Any) -> Any:
        return shards

    def explain(self) -> str:
        return "reward-0: the text 'a film' has no score: it is not liked"


def metrics(step: int, version: int) -> dict[str, float]:
    names = [
        "mismatch/logprob_mean",
        "mismatch/logprob_max",
        "kl/per_sequence",
        "policy/approx_kl_first",
        "policy/ratio_first",
        "learner/skipped_update",
    ]
    return dict.fromkeys(names, 0.0) | {"score/mean": float(version), "rollout/staleness_max": float(step - version)}


def train(
    world: World,
    loop: Callable[..., None],
    steps: int = STEPS,
    resume: str = "never",
    max_restarts: int = 99,
    console: io.StringIO | None = None,
    options: Sequence[str] = (),
) -> Run:
    """Run a loop as the driver does, with a checkpoint after every other step."""
    options = [
        *options,
        "model.path=m",
        "prompts.path=p",
        "reward.path=r",
        f"output_dir={world.folder}",
        f"steps={steps}",
    ]
    options += [f"rollout.batch_size={BATCH}", "checkpoint.every_steps=2", f"ray.max_restarts={max_restarts}"]
    prompts: Any = Prompts()
    actors: Any = SimpleNamespace(rollout=world, reward=Reward(), learner=world)
    with Run.open(
        load_config(None, [*options, f"resume={resume}"]), Console(file=console or io.StringIO()), prompts
    ) as run:
        world.restore(run.start.checkpoint)
        world.engines = run.state.step
        with save_on_exit(run, actors):
            rebuild_on_loss(run, actors, loop)
    return run


def learnt(late: int) -> list[list[int]]:
    return [[step, BATCH * step, max(step - late, 0)] for step in range(STEPS)]


def test_one_step_after_the_other(tmp_path: Path) -> None:
    world = World(tmp_path)
    console = io.StringIO()
    run = train(world, run_steps, 2, console=console)
    assert world.calls == ["generate 0", "update 0", "load 1", "generate 1", "update 1", "load 2", "save 2"]
    assert run.state == RunState(2, 8, "f00")
    said = console.getvalue().splitlines()
    assert said[0] == f"ppo_ray {__version__}: 2 steps of 4 responses each, seed 0, into {tmp_path}"
    assert said[1].startswith("model: m (float32), learning rate 1.41e-05, 4 epochs per step")
    assert said[2] == "reward: r"
    workers = "1 rollout worker on 1 CPU thread, 1 reward worker on 1 CPU thread, 1 learner on 2 CPU threads"
    assert said[3] == f"devices: {workers}; generation by vllm"
    begun = [line.partition("  ")[0] for line in said if line.startswith("step ")]
    assert begun[0] == "step 0 (1/2)" and begun[-1] == "step 1 (2/2)"
    assert said[-1] == "saving the policy after 2 steps: checkpoints/step-00002"


class Wild(World):
    """Its update moves the policy too far in the steps 1 and 2."""

    def update(self, scored: Callable[[], list[int]], step: int) -> UpdateReport:
        report = super().update(scored, step)
        report.metrics.update({"policy/approx_kl": 0.7 if step in (1, 2) else 0.01, "policy/optimizer_steps": 4.0})
        return report


def test_a_figure_that_leaves_its_healthy_range_is_said_once(tmp_path: Path) -> None:
    console = io.StringIO()
    train(Wild(tmp_path), run_steps, console=console)
    said = [line for line in console.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("warning: step 1: policy/approx_kl is 0.7, ")


def test_the_next_batch_is_asked_for_before_the_update_and_held_before_the_sync(tmp_path: Path) -> None:
    world = World(tmp_path)
    run = train(world, run_overlapped, 3)
    assert world.calls == [
        *("generate 0", "hold 0"),
        *("generate 1", "update 0", "hold 1", "load 1"),
        *("generate 2", "update 1", "hold 2", "load 2", "save 2"),
        *("generate 3", "update 2", "hold 3", "load 3", "save 3"),
    ]
    assert world.learnt == learnt(late=1)[:3]
    assert run.state == RunState(3, 12, "f00")  # the next step's prompts, though they have been taken


@pytest.mark.parametrize("write_late", [False, True])
@pytest.mark.parametrize("loop", [run_steps, run_overlapped])
def test_the_best_checkpoint_is_that_of_the_policy_which_sampled_the_best_batch(
    tmp_path: Path, loop: Callable[..., None], write_late: bool
) -> None:
    run = train(
        World(tmp_path, write_late=repeat(write_late)), loop
    )  # a batch scores the version of its policy; version 5 is not saved
    assert (run.folder.checkpoints / "best").readlink().name == "step-00004"
    scores = json.loads((run.folder.checkpoints / "scores.json").read_text())
    assert scores == {"step-00002": 2, "step-00004": 4}


def test_a_run_goes_on_with_the_batch_that_its_checkpoint_holds(tmp_path: Path) -> None:
    train(World(tmp_path), run_overlapped, 3)
    world = World(tmp_path)
    longer = train(world, run_overlapped, STEPS, "required")
    assert world.calls[:3] == ["generate 4", "update 3", "hold 4"]
    assert world.learnt == learnt(late=1)
    assert [line["step"] for line in longer.history] == list(range(STEPS))


@pytest.mark.parametrize(("loop", "late"), [(run_steps, 0), (run_overlapped, 1)])
@settings(deadline=None, max_examples=30)
@given(
    lost=st.lists(st.booleans(), max_size=30),
    again=st.lists(st.booleans(), max_size=30),
    slow=st.lists(st.booleans(), max_size=5),
)
def test_whatever_is_lost_the_policy_learns_the_same(
    loop: Callable[..., None], late: int, lost: list[bool], again: list[bool], slow: list[bool]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), iter(lost), iter(again), iter(slow))
        run = train(world, loop)
        assert world.learnt == learnt(late)
        assert [line["step"] for line in run.history] == list(range(STEPS))
        assert [line["score/mean"] for line in run.history] == [version for _, _, version in learnt(late)]
        assert world.engines == STEPS and run.state == RunState(STEPS, BATCH * STEPS, "f00")


@dataclass
class Doomed(World):
    """The learner dies whenever it is to learn from one of these steps."""

    fatal: tuple[int, ...] = ()
    forgiven: bool = False
    """Whether each kills but once."""

    def update_held(self, step: int) -> UpdateReport:
        if step in self.fatal:
            self.fatal = tuple(other for other in self.fatal if other != step or not self.forgiven)
            raise WorkerLost("learner-0 (pid 7) was lost while updating", "learner-0")
        return super().update_held(step)


@pytest.mark.parametrize("loop", [run_steps, run_overlapped])
def test_a_learner_that_dies_at_the_same_step_again_and_again_ends_the_run(
    tmp_path: Path, loop: Callable[..., None]
) -> None:
    """Though it is rebuilt each time, publishes weights and makes the steps since the checkpoint again."""
    world = Doomed(tmp_path, fatal=(3,))
    message = r"learner-0 was lost 3 times in a row \(ray.max_restarts=2\), and the run came no further than 3 steps"
    with pytest.raises(WorkerError, match=message) as caught:
        train(world, loop, max_restarts=2)
    assert not isinstance(caught.value, WorkerLost)
    assert (world.calls.count("rebuild from step-00002"), world.calls.count("update 2")) == (2, 3)


def test_a_learner_that_dies_once_in_each_step_does_not(tmp_path: Path) -> None:
    world = Doomed(tmp_path, fatal=tuple(range(STEPS)), forgiven=True)
    train(world, run_steps, max_restarts=1)
    assert sum(call.startswith("rebuild") for call in world.calls) == STEPS
    assert world.learnt == learnt(late=0)


def test_a_run_that_ends_before_its_first_step_says_of_no_checkpoint_that_it_is_there() -> None:
    said: list[str] = []
    config = SimpleNamespace(steps=STEPS)
    run: Any = SimpleNamespace(
        state=RunState(), config=config, report=lambda event: said.append(event.message), say=said.append
    )
    actors: Any = SimpleNamespace(learner=SimpleNamespace(last_update=None))
    with pytest.raises(WorkerError, match="gone"), save_on_exit(run, actors):
        raise WorkerError("gone")
    assert said == ["step 0 was not finished: gone"]


def test_a_lost_learners_batch_is_not_kept() -> None:
    """What the work held when the learner was lost, trajectories and weights, would fill the object store."""

    class Batch:
        pass

    held: list[weakref.ref[Batch]] = []

    def work(*_: Any) -> bool:
        if held:
            gc.collect()
            return held[0]() is None
        batch = Batch()
        held.append(weakref.ref(batch))
        raise WorkerLost("gone", "learner-0")

    def nothing(*_: Any) -> None: ...

    checkpoints = SimpleNamespace(abandon=nothing, newest=nothing)
    run: Any = SimpleNamespace(
        state=RunState(), checkpoints=checkpoints, prompts=Prompts(), go_on_from=nothing, report=nothing
    )
    run.config = SimpleNamespace(ray=SimpleNamespace(max_restarts=1))
    learner, rollout = SimpleNamespace(rebuild=nothing, publish=nothing), SimpleNamespace(load_weights=nothing)
    actors: Any = SimpleNamespace(learner=learner, rollout=rollout)
    assert rebuild_on_loss(run, actors, work)


@pytest.mark.parametrize("loop", [run_steps, run_overlapped])
def test_an_update_whose_weights_reach_no_engine_is_kept(tmp_path: Path, loop: Callable[..., None]) -> None:
    """Its step is logged and saved: the next start sends the weights."""
    with pytest.raises(WorkerError, match="rollout-0 was lost too often"):
        train(World(tmp_path, last_sync=3), loop)
    assert (tmp_path / "checkpoints" / "latest").readlink().name == "step-00004"
    world = World(tmp_path)
    run = train(world, loop, resume="required")
    assert run.start.state.step == 4 and [line["step"] for line in run.history] == list(range(STEPS))
    assert world.learnt == learnt(late=int(loop is run_overlapped))


@dataclass
class Unscored(World):
    """No response of these steps has a score."""

    unscored: Sequence[int] = ()

    def update_held(self, step: int) -> UpdateReport:
        report = super().update_held(step)
        if step in self.unscored:
            del report.metrics["score/mean"]
            report.metrics.update({"score/num_unscored": 4.0, "learner/skipped_update": 1.0})
        return report


@pytest.mark.parametrize("loop", [run_steps, run_overlapped])
def test_a_run_without_scores_ends_after_the_steps_that_it_puts_up_with(
    tmp_path: Path, loop: Callable[..., None]
) -> None:
    """It says why at the first of them; what it learned before is saved, and it can go on."""
    console, few = io.StringIO(), ["reward.max_unscored_steps=1"]
    world = Unscored(tmp_path, unscored=(0, 2, 3, 4))
    message = (
        r"^the last 2 steps are without any score \(reward.max_unscored_steps=1\); reward-0: .*'a film'.* not liked$"
    )
    with pytest.raises(WorkerError, match=message):
        train(world, loop, console=console, options=few)
    said = console.getvalue()
    assert said.count("has no score and nothing to learn from; reward-0: the text 'a film'") == 2  # steps 0 and 2
    assert "the state after 4 steps is in" in said
    kinds = [line.get("event") for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert kinds.count("unscored_step") == 2
    with pytest.raises(WorkerError, match="the last 3 steps"):
        train(Unscored(tmp_path, unscored=(4,)), loop, resume="required", options=few)
    mended = train(World(tmp_path), loop, resume="required", options=few)
    assert mended.state.step == STEPS


def test_the_first_step_without_a_score_ends_a_run_that_puts_up_with_none(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="^the last step is without any score"):
        train(Unscored(tmp_path, unscored=(3,)), run_steps, options=["reward.max_unscored_steps=0"])


@pytest.mark.parametrize("loop", [run_steps, run_overlapped])
def test_a_run_too_short_for_the_limit_ends_in_an_error_if_nothing_was_scored(
    tmp_path: Path, loop: Callable[..., None]
) -> None:
    with pytest.raises(WorkerError, match=r"^none of the run's 2 steps has any score; reward-0"):
        train(Unscored(tmp_path, unscored=range(2)), loop, steps=2)
    assert (tmp_path / "checkpoints" / "latest").readlink().name == "step-00002"
