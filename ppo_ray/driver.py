"""The loop of PPO over Ray actors, and what stands before and after it."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from ppo_ray import preflight, stopping
from ppo_ray.actors.gauges import Gauges
from ppo_ray.actors.launch import Actors, check_engines, launch
from ppo_ray.actors.session import ray_session
from ppo_ray.checkpoint import Checkpoints, RunState
from ppo_ray.config import Config
from ppo_ray.errors import PPORayError, WorkerLost
from ppo_ray.evaluation import Evaluation
from ppo_ray.events import Event
from ppo_ray.held_out import evaluate, prompt_stream
from ppo_ray.metrics import MetricsLog
from ppo_ray.prompts import PromptStream
from ppo_ray.report import StepProgress, draw_curves, print_agreements, print_summary, write_samples
from ppo_ray.resume import Start, find_start, finished, open_folder
from ppo_ray.run_folder import RunFolder, config_text

Metrics = dict[str, float]
Result = TypeVar("Result")

_CHECK_PROMPTS = 8


@dataclass
class Run:
    """A run under way."""

    config: Config
    prompts: PromptStream
    folder: RunFolder
    checkpoints: Checkpoints
    log: MetricsLog
    gauges: Gauges
    console: Console
    state: RunState
    """After the last whole step."""
    history: list[Metrics] = field(default_factory=list)
    """Each step's metrics."""
    synced: Metrics = field(default_factory=dict)
    """Of the last weight sync: that of the weights which sample the next step."""

    def report(self, event: Event) -> None:
        """Log an event, and say it."""
        self.log.event(event)
        self.gauges.count(event)
        self.say(event.message)

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish_step(self, metrics: Metrics) -> None:
        """Log a step's metrics; what comes after belongs to the next one, and may be lost without losing this."""
        step = self.state.step
        self.history.append(self.log.write(step, metrics | self.synced))
        self.gauges.set(self.history[-1])
        self.state = RunState(step + 1, self.prompts.position, self.prompts.fingerprint)

    def go_on_from(self, state: RunState) -> None:
        """Take up the run at a state: prompts, metrics and history are as they were."""
        self.state, self.prompts.position = state, state.prompt_position
        self.history = self.log.go_on(state.step)


def train(config: Config, console: Console) -> None:
    """Train a policy as the config says, and leave everything about it in `output_dir`.

    Raises:
        InputError: something in the config cannot be used; nothing was started or written.
        WorkerError: an actor failed, or was lost too often.
        CheckpointError: a checkpoint could not be written.
        Interrupted: SIGTERM or Ctrl-C; what was done is saved.
    """
    preflight.check(config)
    folder = open_folder(config)
    with folder.locked(), MetricsLog(folder.path) as log:
        if finished(folder, config):
            console.print(f"the run in {folder.path} has made its {config.steps} steps: nothing to do", soft_wrap=True)
            return
        prompts = prompt_stream(config)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, config_text(config), lambda e: run.report(e))
        run = Run(config, prompts, folder, checkpoints, log, Gauges(folder.path.name), console, RunState())
        start = find_start(folder, config, checkpoints, prompts.fingerprint)
        folder.write_config(config)
        begin(run, start)
        with (
            ray_session(config.ray),
            launch(config, folder.trajectories, start.checkpoint, run.say, run.report) as actors,
        ):
            before = whatever_the_learner(run, actors, lambda: evaluate_before(run, actors))
            with saved_if_it_ends(run, actors):
                whatever_the_learner(run, actors, lambda: run_steps(run, actors))
            after = evaluate(actors.rollout, actors.reward, prompts.held_out(), config)
    if before and after:
        write_samples(folder.samples, before, after)
    draw_curves(folder.curves, run.history, before, after)
    checkpoints.finish_run(run.state.step)
    print_summary(console, folder, run.history, before, after)


def check(config: Config, console: Console) -> None:
    """Start all actors, prove that new weights change what every engine computes, and show by how much.

    Raises:
        InputError: something in the config cannot be used.
        WorkerError: an actor failed, or an engine does not compute with what it was sent; names it.
    """
    preflight.check(config)
    prompts = prompt_stream(config).peek(_CHECK_PROMPTS)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_session(config.ray),
        launch(config, Path(folder), None, say, lambda event: say(event.message)) as actors,
    ):
        print_agreements(console, check_engines(actors, config, prompts))


def run_steps(run: Run, actors: Actors) -> None:
    """Run PPO: sample, score, update, broadcast, step after step, from the run's state to `config.steps`.

    The driver holds references: what it reads of a step is a few floats.
    """
    config, prompts, checkpoints = run.config, run.prompts, run.checkpoints
    run.log.start_clock()
    with StepProgress(config.steps, run.console, run.state.step) as progress:
        for step in range(run.state.step, config.steps):
            batch = prompts.take(config.rollout.batch_size)  # sample ids and token ids, in order
            trajectories = actors.rollout.generate(batch, step)  # references, in order, at once
            scored = actors.reward.score(trajectories)  # a shard is scored as soon as it is generated
            checkpoints.finish()  # written while the engines generate
            update = actors.learner.update(scored, step)  # one PPO update on the whole batch
            run.finish_step(update.metrics | {"prompts/num_skipped": batch.num_skipped})
            run.synced = actors.rollout.load_weights(update.weights)  # all engines acknowledge version and checksum
            progress.update(step, run.history[-1])
            checkpoints.scored(step, update.metrics.get("score/mean"))
            if checkpoints.due(step + 1, config.steps):
                checkpoints.save(run.state, actors.learner.save)
            if step == 0 and not update.metrics["learner/skipped_update"]:
                say_sanity(run)
            stopping.check()
    checkpoints.finish()


def whatever_the_learner(run: Run, actors: Actors, work: Callable[[], Result]) -> Result:
    """Do the work; a lost learner is rebuilt from the newest checkpoint, and the work is taken up from there."""
    lost: WorkerLost | None = None
    while True:
        try:
            if lost is not None:
                rebuild_learner(run, actors, lost)
            return work()
        except WorkerLost as error:
            lost = error


def rebuild_learner(run: Run, actors: Actors, lost: WorkerLost) -> None:
    """Put another learner in the lost one's place, and the whole run back to the newest checkpoint."""
    run.checkpoints.abandon()
    path, state = run.checkpoints.newest() or (None, RunState(prompts_fingerprint=run.prompts.fingerprint))
    steps = run.state.step
    actors.learner.rebuild(lost, path)
    run.synced = actors.rollout.load_weights(actors.learner.weights())
    run.go_on_from(state)
    source = f"from {path.name}" if path else "as the run began"
    run.report(
        Event("learner_rebuilt", f"learner rebuilt {source}; steps {state.step} to {steps} are made again", lost.name)
    )


@contextlib.contextmanager
def saved_if_it_ends(run: Run, actors: Actors) -> Iterator[None]:
    """Save the state after the last whole step if the block is ended by a signal or an error, and say where it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PPORayError):
            run.report(Event("interrupted", f"step {run.state.step} was not finished: {str(error).splitlines()[0]}"))
        try:
            if run.state.step:
                run.checkpoints.save(run.state, actors.learner.save)
                run.checkpoints.finish()
        except PPORayError as unsaved:
            run.say(f"the steps since the newest checkpoint could not be saved and will be made again: {unsaved}")
        else:
            run.say(f"the state after {run.state.step} steps is in {run.folder.checkpoints}; go on with --resume")
        raise


def begin(run: Run, start: Start) -> None:
    """Take up the run where it starts, and say so."""
    run.go_on_from(start.state)
    run.say(run.prompts.summary)
    if start.checkpoint is None:
        return
    changed = "".join(f"; {item}" for item in start.changed)
    run.report(Event("resumed", f"going on after step {start.state.step} from {start.checkpoint.name}{changed}"))


def evaluate_before(run: Run, actors: Actors) -> Evaluation | None:
    """Check the engines, give them the learner's weights, and evaluate the policy as the run began, or recall it."""
    config, rollout = run.config, actors.rollout
    if config.rollout.self_check:
        agreements = check_engines(actors, config, run.prompts.peek(_CHECK_PROMPTS))
        worst = max(item.to_moved for item in agreements)
        run.say(
            f"new weights change what every engine computes, as they should: {worst:.1e} nats a token off the learner"
        )
    run.synced = rollout.load_weights(actors.learner.weights())
    seconds = run.synced["time/sync_s"]
    run.say(f"weights of policy version {run.state.step} in every engine, verified, in {seconds:.1f} s")
    if run.folder.before.is_file():
        return Evaluation.read(run.folder.before)
    if run.state.step:
        return None
    before = evaluate(rollout, actors.reward, run.prompts.held_out(), config)
    if before:
        before.write(run.folder.before)
    return before


def say_sanity(run: Run) -> None:
    """Print what must hold at the first step if engines, learner and reference compute the same policy."""
    metrics = run.history[0]
    run.say(
        "step 0 sanity: "
        f"|rollout - learner| log-probability {metrics['mismatch/logprob_mean']:.1e} mean, "
        f"{metrics['mismatch/logprob_max']:.1e} max; "
        f"KL to the reference {metrics['kl/per_sequence']:.1e}; "
        f"ratio of the first mini-batch 1{metrics['policy/ratio_first'] - 1:+.1e}"
    )
