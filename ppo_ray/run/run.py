"""A run: its prompts, its folder and what it keeps of every step.

Steps are counted in one way everywhere. The number of a step is how many steps were done before it: a run of 30 steps
has the steps 0 to 29. So step 10 is in the line `"step": 10` of metrics.jsonl and in trajectories/step-00010.parquet.
Its batch is sampled by the policy of checkpoints/step-00010, the policy after 10 steps. (With `rollout.max_staleness=1`
the policy before that one samples it.)
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import takewhile
from typing import Self

from rich.console import Console

from ppo_ray import __version__, preflight, stopping
from ppo_ray.actors.watch import show_waits
from ppo_ray.checkpoint import BeginSave, RunState
from ppo_ray.config import Config
from ppo_ray.errors import WorkerError
from ppo_ray.events import Event, say
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.plan import find_emulated_dtypes
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.run.checkpoints import Checkpoints
from ppo_ray.run.folder import RunFolder, config_text
from ppo_ray.run.gauges import Gauges
from ppo_ray.run.health import HealthCheck
from ppo_ray.run.log import MetricsLog
from ppo_ray.run.progress import StepProgress
from ppo_ray.run.resume import Start, find_start, open_folder
from ppo_ray.run.tracking import Tracking, track


class Run:
    """A run whose folder is open; `open` makes one."""

    def __init__(
        self,
        config: Config,
        prompts: PromptStream,
        sets: Mapping[str, PromptBatch],
        folder: RunFolder,
        log: MetricsLog,
        console: Console,
    ) -> None:
        """Take what is open already; the run stands before its first step."""
        self._sets = sets
        self.config, self.prompts, self.folder, self.console = config, prompts, folder, console
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, config_text(config), self.report)
        self.state = RunState(prompts_fingerprint=prompts.fingerprint)
        """After the last step that ended."""
        self.start = Start(self.state)
        """Where the run began in this process."""
        self.history: list[dict[str, float]] = []
        """Metrics of each step."""
        self._evaluated: dict[str, float] = {}
        self._log, self._gauges = log, Gauges(folder.path.name)
        self._health = HealthCheck(config.ppo.policy_loss, config.ppo.value_warmup_steps)
        self._tracking = Tracking(config, folder, self.report)
        self._progress: StepProgress  # set by `under_way`, as the next two
        self._save: BeginSave
        self._explain: Callable[[], str]

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: Config, console: Console, prompts: PromptStream | None = None) -> Iterator[Self]:
        """Check the config, open or create the run's folder, lock it, and find the step to begin or go on with.

        Args:
            config: of the run.
            console: shows events, progress and results.
            prompts: of the run; None: check the whole config, and read them as it says.

        Raises:
            InputError: something in the config cannot be used; nothing was started or written.
        """
        inputs = preflight.Inputs()
        if prompts is None:
            inputs = preflight.check(config)
            prompts = inputs.open_prompts(config, partial(say, console))
        folder = open_folder(config)
        with folder.lock(), MetricsLog(folder.path) as log, contextlib.ExitStack() as stack:
            run = cls(config, prompts, inputs.open_sets(config), folder, log, console)
            run._begin()
            for note in filter(None, [inputs.describe_ends(), *inputs.notes]):
                run.say(note)
            run._tracking = stack.enter_context(track(config, folder, run.report))
            yield run

    @contextlib.contextmanager
    def under_way(self, save: BeginSave, explain: Callable[[], str]) -> Iterator[None]:
        """Show progress while the block makes steps; at its end the last checkpoint is written.

        Args:
            save: begins to write a checkpoint of the learner, and returns what waits for it.
            explain: returns why a response has no score.
        """
        self._save, self._explain = save, explain
        self._log.start_clock()
        self._progress = StepProgress(self.config.steps, self.console, self.state.step)
        self._progress.show_history(self.history)
        with self._progress, show_waits(self._progress.show_phase):
            yield
        self.checkpoints.finish()
        if self.history and self._num_unscored_steps() == len(self.history):
            raise WorkerError(f"none of the run's {len(self.history)} steps has any score; {self._explain()}")

    def end_step(self, step: int, update: UpdateReport) -> None:
        """End a step within `under_way`: log its metrics, show progress, and begin a checkpoint if one is due.

        Raises:
            CheckpointError: a checkpoint before could not be written.
            WorkerError: too many steps in a row are without any score.
            Interrupted: the run is to be stopped; the step is done.
        """
        self.record(update)
        self._progress.update(step, self.history[-1])
        self._tracking.check()
        for warning in self._health.find_warnings(self.history):
            self.say(warning)
        if step == 0 and not update.metrics["learner/skipped_update"]:
            self._say_sanity()
        self.checkpoints.finish(wait=False)  # the one before, if it is written: the loop waits for no disk
        best_by = self.config.checkpoint.best_by
        staleness = int(update.metrics["rollout/staleness_max"]) if best_by == "score/mean" else 0
        self.checkpoints.note_score(step - staleness, self.history[-1].get(best_by))
        if self.checkpoints.is_due(step + 1, self.config.steps):
            self.say(f"saving the policy after {step + 1} steps: {self.folder.checkpoints.name}/step-{step + 1:05d}")
            self.checkpoints.save(self.state, self._save)
        self._check_scores()
        stopping.check()

    @property
    def held_out(self) -> dict[str, PromptBatch]:
        """The prompts of an evaluation: the run's own under an empty name, then those of `evaluation.sets`."""
        return {"": self.prompts.held_out(), **self._sets}

    def note_evaluation(self, figures: Mapping[str, float]) -> None:
        """Keep the figures of the policy's evaluation for the metrics of the step that it samples."""
        self._evaluated = dict(figures)

    def record(self, update: UpdateReport) -> None:
        """Log an update's metrics; from now on its step is one of the run's."""
        metrics, self._evaluated = update.metrics | self._evaluated, {}
        self.history.append(self._log.write(update.step, metrics, update.actors))
        self._gauges.set(self.history[-1])
        num_taken = self.config.rollout.num_prompts + int(update.metrics.get("groups/num_refilled", 0))
        position = self.state.prompt_position + num_taken  # however many are taken ahead
        self.state = RunState(update.step + 1, position, self.prompts.fingerprint)

    def go_on_from(self, state: RunState) -> None:
        """Return to a state: prompts, metrics and history are as they were."""
        self.state, self.prompts.position = state, state.prompt_position
        self.history, self._evaluated = self._log.resume(state.step), {}

    def report(self, event: Event) -> None:
        """Log an event, count it, and show it."""
        self._log.event(event)
        self._gauges.count(event)
        self.say(event.message)

    def say(self, text: str) -> None:
        """Print a line as it is."""
        say(self.console, text)

    def _begin(self) -> None:
        """Find the state to begin with, take it up, and say so."""
        if self.config.resume == "never":
            self.folder.clear()
        self.start = find_start(self.folder, self.config, self.checkpoints, self.prompts.fingerprint)
        self.folder.write_config(self.config)
        self.go_on_from(self.start.state)
        for line in describe_run(self.config, self.folder):
            self.say(line)
        self.say(self.prompts.summary)
        if self.start.checkpoint is not None:
            changed = "".join(f"; {item}" for item in self.start.changed)
            source = f"from {self.start.checkpoint.name}{changed}"
            self.report(Event("resumed", f"going on after {self.state.step} steps {source}"))

    def _num_unscored_steps(self) -> int:
        """Return how many steps in a row, up to the last, had responses and no score."""
        unscored = (
            "score/mean" not in step and bool(step.get("score/num_unscored")) for step in reversed(self.history)
        )
        return len(list(takewhile(bool, unscored)))

    def _check_scores(self) -> None:
        """Say why a step is without any score if it is the first of a row; end the run if the row is too long."""
        limit, row = self.config.reward.max_unscored_steps, self._num_unscored_steps()
        if row > limit:
            steps = "the last step is" if row == 1 else f"the last {row} steps are"
            raise WorkerError(f"{steps} without any score (reward.max_unscored_steps={limit}); {self._explain()}")
        if row == 1:
            why = f"step {self.state.step - 1} has no score and nothing to learn from; {self._explain()}"
            self.report(Event("unscored_step", why))

    def _say_sanity(self) -> None:
        """Print what must hold at the first step if engines, learner and reference compute the same policy."""
        metrics = self.history[0]
        self.say(
            "step 0 checked: the log-probabilities of engines and learner differ by "
            f"{metrics['mismatch/logprob_mean']:.1e} nats per token (the largest difference is "
            f"{metrics['mismatch/logprob_max']:.1e}); KL to the reference {metrics['kl/per_sequence']:.1e} nats per "
            f"sequence; the learner repeats its own log-probabilities to {metrics['policy/approx_kl_first']:.1e}"
        )


def describe_run(config: Config, folder: RunFolder) -> Iterator[str]:
    """Yield lines that say what runs: version, steps, seed, folder, model, reward, devices, and what is slow."""
    rollout, ppo = config.rollout, config.ppo
    each = f", {rollout.responses_per_prompt} to a prompt" if rollout.responses_per_prompt > 1 else " each"
    yield (
        f"ppo_ray {__version__}: {config.steps} steps of {rollout.batch_size} responses{each}, seed {config.seed}, "
        f"into {folder.path}"
    )
    yield (
        f"model: {config.model.path} ({config.model.dtype}), learning rate {ppo.learning_rate:g}, {ppo.epochs} epochs "
        f"per step, at most {rollout.max_response_tokens} tokens per response"
    )
    sources = (
        source.path or source.function or source.url or (source.judge and f"judge {source.judge.path}")
        for _, source in config.reward.sources
    )
    yield f"reward: {', '.join(map(str, sources))}"
    devices = [
        f"{_count(workers, noun)} on {_count(gpus, 'GPU') if gpus else _count(threads, 'CPU thread')}"
        + " each" * (workers > 1)
        for noun, workers, gpus, threads in (
            ("rollout worker", rollout.workers, rollout.gpus * rollout.tensor_parallel, rollout.threads),
            ("reward worker", config.reward.workers, config.reward.gpus, config.reward.threads),
            ("learner", config.learner.workers, config.learner.gpus, config.learner.threads),
        )
    ]
    yield f"devices: {', '.join(devices)}; generation by {rollout.engine}"
    yield from (f"warning: {problem}" for problem in find_emulated_dtypes(config))


def _count(number: float, noun: str) -> str:
    """Write a number with its noun, e.g. `1 CPU thread` and `0.5 GPUs`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
