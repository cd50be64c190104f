"""The loop of PPO over Ray actors: one step after the other, or each batch sampled while the last one is learnt."""

from dataclasses import dataclass, field

from rich.console import Console

from ppo_ray import stopping
from ppo_ray.checkpoint import RunState
from ppo_ray.config import Config
from ppo_ray.events import Event
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.run.actors import Actors
from ppo_ray.run.checkpoints import Checkpoints
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.gauges import Gauges
from ppo_ray.run.log import MetricsLog
from ppo_ray.run.progress import StepProgress

Metrics = dict[str, float]


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
        position = self.state.prompt_position + self.config.rollout.batch_size  # however many are taken ahead
        self.state = RunState(step + 1, position, self.prompts.fingerprint)

    def go_on_from(self, state: RunState) -> None:
        """Take up the run at a state: prompts, metrics and history are as they were."""
        self.state, self.prompts.position = state, state.prompt_position
        self.history = self.log.go_on(state.step)


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


def run_overlapped(run: Run, actors: Actors) -> None:
    """Run PPO one step off-policy: while the learner works on a batch, the next one is sampled and scored.

    So each batch but the first is sampled by the policy before the last update, and whatever is lost, it must be
    sampled by no other. Therefore the engines get new weights only when the learner holds what they sampled with the
    old ones, and what it holds is saved with it. One batch is left over after the last step: a longer run goes on
    with it.
    """
    config, prompts, checkpoints = run.config, run.prompts, run.checkpoints
    run.log.start_clock()
    with StepProgress(config.steps, run.console, run.state.step) as progress:
        batch = prompts.take(config.rollout.batch_size)
        if run.state.step == 0:  # else the learner holds what was sampled for it
            actors.learner.hold(actors.reward.score(actors.rollout.generate(batch, 0)), may_stop=True)
        for step in range(run.state.step, config.steps):
            following = prompts.take(config.rollout.batch_size)
            trajectories = actors.rollout.generate(following, step + 1)  # by the weights before this step's update
            ahead = actors.reward.score(trajectories)
            checkpoints.finish()
            update = actors.learner.update_held(step)  # one PPO update, while the others sample and score
            waited = actors.learner.hold(ahead)  # nobody can sample it again once the engines have other weights
            run.finish_step(update.metrics | waited | {"prompts/num_skipped": batch.num_skipped})
            run.synced = actors.rollout.load_weights(update.weights)
            progress.update(step, run.history[-1])
            checkpoints.scored(max(step - 1, 0), update.metrics.get("score/mean"))  # the policy that sampled it
            if checkpoints.due(step + 1, config.steps):
                checkpoints.save(run.state, actors.learner.save)
            if step == 0 and not update.metrics["learner/skipped_update"]:
                say_sanity(run)
            stopping.check()
            batch = following
    checkpoints.finish()


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
