"""Whole runs of actors: training, the check of the engines, the evaluation of a checkpoint."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from ppo_ray import preflight
from ppo_ray.actors.session import ray_session
from ppo_ray.checkpoint import RunState
from ppo_ray.config import Config, load_config, load_evaluation_config
from ppo_ray.errors import CheckpointError, InputError, Interrupted, PPORayError, WorkerError, WorkerLost
from ppo_ray.events import Event, say
from ppo_ray.machine import measure_disk
from ppo_ray.plan import ModelSizes
from ppo_ray.plan.plan import find_stop_problem
from ppo_ray.run.actors import Actors, launch, launch_scorers, start_imports
from ppo_ray.run.curves import draw_curves
from ppo_ray.run.evaluation import Evaluation, evaluate_now, score_held_out
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.health import healthy_ranges
from ppo_ray.run.log import read_steps
from ppo_ray.run.loop import run_overlapped, run_steps, run_with_refills
from ppo_ray.run.progress import format_duration
from ppo_ray.run.record import RunRecord
from ppo_ray.run.report import write_report
from ppo_ray.run.resume import is_finished
from ppo_ray.run.run import Run
from ppo_ray.run.summary import print_agreements, print_evaluation, print_summary, write_samples
from ppo_ray.weights.acks import Agreement

Result = TypeVar("Result")

_CHECK_PROMPTS = 8


@dataclass(frozen=True)
class RunReport:
    """The result of a run."""

    folder: RunFolder
    """Paths of what the run wrote, e.g. `final_checkpoint`."""
    history: Sequence[Mapping[str, float]]
    """Metrics of each step of the run, by the names in docs/diagnostics.md; a figure that was not finite may be NaN."""
    before: Evaluation | None
    """Held-out prompts before the first step; None: none is held out, or the call had no step to make."""
    after: Evaluation | None
    """Held-out prompts after the last step; None as above."""


def train(config: Config, console: Console | None = None) -> RunReport:
    """Train a policy as the config says, and leave everything about it in `output_dir`.

    Without `ray.address` a Ray of its own is started and stopped, unless the process is connected to one already.

    Args:
        config: of the run.
        console: shows progress and results; None: standard output. `Console(quiet=True)` shows nothing.

    Returns:
        What the run measured, and where it wrote it.

    Raises:
        InputError: something in the config cannot be used; nothing was started or written.
        WorkerError: an actor failed, or was lost too often.
        CheckpointError: a checkpoint could not be written.
        Interrupted: SIGTERM or Ctrl-C; what was done is saved.
    """
    console = console or Console()
    began = time.monotonic()
    if is_finished(folder := RunFolder(Path(config.output_dir).absolute()), config):
        say(console, f"the run in {folder.path} has made its {config.steps} steps: nothing to do")
        history = read_steps(folder.path)
        print_summary(console, folder, config, history, *_read_evaluations(folder))
        return RunReport(folder, history, None, None)
    steps = run_overlapped if config.rollout.max_staleness else run_steps
    if config.rollout.flat_groups == "refill":
        steps = run_with_refills
    with start_imports(config), Run.open(config, console) as run:
        with (
            ray_session(config.ray),
            launch(config, run.folder.trajectories, run.start.checkpoint, run.say, run.report) as actors,
        ):
            before = rebuild_on_loss(run, actors, evaluate_before)
            with save_on_exit(run, actors):
                rebuild_on_loss(run, actors, steps)
            after = None
            with say_failure(run, "the evaluation after the last step"):
                after = evaluate_now(run, actors)
                if after:
                    after.write(run.folder.after)
                    run.checkpoints.note_score(run.state.step, after.figures.get(config.checkpoint.best_by))
            run.checkpoints.finish_run(run.state.step)
        with say_failure(run, "the table of samples"):
            if before and after:
                write_samples(run.folder.samples, before, after)
        with say_failure(run, "the picture of the curves"):
            title = f"{run.folder.path.name}: {config.model.path}, {len(run.history)} steps, seed {config.seed}"
            target = config.ppo.kl_target if config.ppo.kl_controller == "adaptive" else None
            ranges = healthy_ranges(config.ppo.policy_loss)
            draw_curves(run.folder.curves, run.history, before, after, title, target, ranges)
        if config.report:  # here, so that trackers get it
            with say_failure(run, "the report"):
                write_report(RunRecord.read(run.folder.path), run.folder.report)
    print_summary(console, run.folder, config, run.history, before, after)
    made = config.steps - run.start.state.step
    run.say(f"{made} steps in {format_duration(time.monotonic() - began)}, start and evaluations included")
    return RunReport(run.folder, run.history, before, after)


def _read_evaluations(folder: RunFolder) -> Iterator[Evaluation | None]:
    """Yield what a finished run's folder has of the evaluations before and after; None for one that it has not."""
    for path in (folder.before, folder.after):
        try:
            yield Evaluation.read(path)
        except CheckpointError:
            yield None


def check(config: Config, console: Console | None = None) -> list[Agreement]:
    """Start all actors, prove that new weights change what every engine computes, and show by how much.

    Args:
        config: of the run that would follow; nothing is trained, and nothing stays written.
        console: as in `train`.

    Returns:
        What was found of each rollout worker: differences of log-probabilities, nats per token.

    Raises:
        InputError: something in the config cannot be used.
        WorkerError: an actor failed, or an engine does not compute with what it was sent; names it.
    """
    console = console or Console()
    show = partial(say, console)
    with start_imports(config):
        prompts = preflight.check(config).open_prompts(config, show).peek(_CHECK_PROMPTS)
        launched = launch(config, None, None, show, lambda event: show(event.message))
        with ray_session(config.ray), launched as actors:
            agreements = actors.rollout.check_engines(actors.learner, prompts)
            print_agreements(console, agreements)
    _check_disk(config, show)
    return agreements


def _check_disk(config: Config, show: Callable[[str], None]) -> None:
    """Write to the disk of the run's folder, and say whether a run that is stopped is saved in time."""
    try:
        speed = measure_disk(Path(config.output_dir).absolute())
    except OSError as error:
        show(f"Warning: output_dir={config.output_dir}: its disk cannot be written to: {error}")
        return
    problem = find_stop_problem(config, ModelSizes.read(config), speed)
    show(f"Warning: {problem}" if problem else f"the disk of output_dir takes {speed / 1e6:,.0f} MB/s")


def evaluate(source: str | Path, overrides: Sequence[str] = (), console: Console | None = None) -> Evaluation:
    """Score a policy's responses to the held-out prompts, and show them.

    A checkpoint may be a stranger's: its config runs no code, trusts no files and connects to nowhere.

    Args:
        source: a checkpoint, a folder such as `RUN/checkpoints/final`; or the config file of a run, whose model is
            evaluated.
        overrides: `section.option=value` each; they win over the config.
        console: as in `train`.

    Returns:
        The scores. Responses are sampled with the same seeds in every run and every evaluation.

    Raises:
        InputError: it is no checkpoint of ours, or the config cannot be used here.
        WorkerError: an actor failed, was lost or was late.
    """
    console = console or Console()
    dropped: list[str] = []
    if Path(source).is_file():
        config = load_config(source, ["output_dir=.", *overrides])
    else:
        config, dropped = load_evaluation_config(source, overrides)
    for option in dropped:
        say(console, f"not taken from the checkpoint's config: {option}; give it on this command line if you trust it")
    merged = config.rollout.model_copy(update={"adapter_sync": "merged"})  # no learner sends any
    config = config.model_copy(update={"rollout": merged})
    show = partial(say, console)
    with start_imports(config, ["rollout", "reward"]):
        inputs = preflight.check(config)
        held_out = {"": inputs.open_prompts(config, show).held_out(), **inputs.open_sets(config)}
        launched = launch_scorers(config, show, lambda event: show(event.message))
        with ray_session(config.ray), launched as (rollout, reward):
            evaluation = score_held_out(rollout, reward, held_out, config)
    if evaluation is None:
        raise InputError("evaluation.num_prompts=0: nothing is held out to be scored; set it to 1 or more")
    print_evaluation(console, evaluation)
    return evaluation


def rebuild_on_loss(run: Run, actors: Actors, work: Callable[[Run, Actors], Result]) -> Result:
    """Do the work; if the learner is lost, rebuild it from the newest checkpoint and do the work from there.

    Raises:
        WorkerError: it was lost too often (`ray.max_restarts`) without a step more than before.
    """
    limit = run.config.ray.max_restarts
    lost: WorkerLost | None = None
    losses, furthest = 0, run.state.step
    while True:
        try:
            if lost is not None:
                rebuild_learner(run, actors, lost)
            return work(run, actors)
        except WorkerLost as error:
            lost = WorkerLost(str(error), error.name)  # its traceback would keep a batch and a copy of the weights
            losses = losses + 1 if run.state.step <= furthest else 1
            furthest = max(furthest, run.state.step)
            if losses > limit:
                raise WorkerError(
                    f"{lost.name} was lost {losses} times in a row (ray.max_restarts={limit}), and the run came no "
                    f"further than {furthest} steps; the last time: {lost}"
                ) from error


def rebuild_learner(run: Run, actors: Actors, lost: WorkerLost) -> None:
    """Replace the lost learner, and return the whole run to the newest checkpoint."""
    run.checkpoints.abandon()
    path, state = run.checkpoints.newest() or (None, RunState(prompts_fingerprint=run.prompts.fingerprint))
    steps = run.state.step
    actors.learner.rebuild(lost, path)
    actors.rollout.load_weights(actors.learner.publish())
    run.go_on_from(state)
    source = f"from {path.name}" if path else "as the run began"
    run.report(
        Event("learner_rebuilt", f"learner rebuilt {source}; steps {state.step} to {steps} are made again", lost.name)
    )


@contextlib.contextmanager
def say_failure(run: Run, what: str) -> Iterator[None]:
    """Say what failed in the block, and go on: the run is done and its result is saved."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, it must not cost the run
        run.say(f"{what} failed, the trained policy is in {run.folder.final_checkpoint}: {error}")


@contextlib.contextmanager
def save_on_exit(run: Run, actors: Actors) -> Iterator[None]:
    """Save the state after the last whole step if a signal or an error ends the block, and say where it is."""
    try:
        yield
    except Exception as error:
        update = actors.learner.last_update
        if update is not None and update.step == run.state.step:
            run.record(update)  # only its weights did not reach every engine, which the next start makes up for
        if isinstance(error, PPORayError):
            step = run.state.step
            what = "the run ended in an error" if step == run.config.steps else f"step {step} was not finished"
            why = f"{what}: {str(error).splitlines()[0]}"
            # on a full disk what ended the run is said all the same, and saved if it can be
            with contextlib.suppress(OSError):
                run.report(Event("interrupted", why))
        if not run.state.step:
            raise
        try:
            run.checkpoints.save(run.state, actors.learner.save)
            run.checkpoints.finish()
        except PPORayError as unsaved:
            run.say(f"the steps since the newest checkpoint could not be saved and will be made again: {unsaved}")
        else:
            run.say(f"the state after {run.state.step} steps is in {run.folder.checkpoints}; go on with --resume")
        raise


def evaluate_before(run: Run, actors: Actors) -> Evaluation | None:
    """Check the engines, send them the learner's weights, and evaluate the policy that the run began with.

    A run that goes on reads that evaluation from its folder.
    """
    config, rollout = run.config, actors.rollout
    if config.rollout.self_check:
        agreements = actors.rollout.check_engines(actors.learner, run.prompts.peek(_CHECK_PROMPTS))
        worst = max(item.to_moved for item in agreements)
        run.say(f"self-check passed: engines compute the learner's log-probabilities to {worst:.1e} nats per token")
    seconds = rollout.load_weights(actors.learner.publish())
    run.say(f"every engine has the policy's weights after {run.state.step} steps, verified, in {seconds:.1f} s")
    if run.folder.before.is_file():
        return Evaluation.read(run.folder.before)
    if run.state.step:
        return None
    before = evaluate_now(run, actors)
    if before:
        before.write(run.folder.before)
    return before
