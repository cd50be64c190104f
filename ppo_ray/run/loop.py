"""The loop of PPO over Ray actors, as functions: step after step, with generation one step ahead, with full batches.

    prompts --token ids--> rollout --responses--> reward --scores--> learner --weights--> rollout

The driver, which runs this, holds references to the data of a step and reads a few floats. In `run_steps` the engines
wait for the update, and the learner waits for the batch. In `run_overlapped` the engines sample the next batch during
the update. In `run_with_refills` a step goes on sampling until it has groups enough to learn from.
"""

from ppo_ray.actors.shards import Rounds
from ppo_ray.run.actors import Actors
from ppo_ray.run.evaluation import evaluate_when_due
from ppo_ray.run.run import Run


def run_steps(run: Run, actors: Actors) -> None:
    """Run PPO step after step, from the run's state to `config.steps`: sample, score, update, broadcast."""
    config, prompts = run.config, run.prompts
    with run.under_way(actors.learner.save, actors.reward.explain):
        for step in range(run.state.step, config.steps):
            evaluate_when_due(run, actors)  # on held-out prompts, by the policy so far
            batch = prompts.take(config.rollout.batch_size)  # sample ids and token ids, in order
            trajectories = actors.rollout.generate(batch, step)  # references, in order, at once
            scored = actors.reward.score(trajectories)  # a shard is scored as soon as it is generated
            update = actors.learner.update(scored, step)  # one PPO update on the whole batch
            weights = actors.learner.publish()  # versioned, checksummed
            actors.rollout.load_weights(weights)  # all engines acknowledge both
            run.end_step(step, update)  # metrics, progress, checkpoint when due


def run_overlapped(run: Run, actors: Actors) -> None:
    """Run PPO one step off-policy: while the learner works on a batch, the next one is sampled and scored.

    Each batch but the first is sampled by the policy before the last update. Whatever is lost, no other policy may
    sample it. So the engines get new weights only when the learner holds the batch that the old ones sampled, and a
    checkpoint contains that batch. One batch is left over after the last step; a longer run goes on with it.
    """
    config, prompts = run.config, run.prompts
    with run.under_way(actors.learner.save, actors.reward.explain):
        first = prompts.take(config.rollout.batch_size)
        if run.state.step == 0:  # else the learner holds what was sampled for these prompts
            actors.learner.hold(actors.reward.score(actors.rollout.generate(first, 0)), may_stop=True)
        for step in range(run.state.step, config.steps):
            evaluate_when_due(run, actors)
            batch = prompts.take(config.rollout.batch_size)  # of the next step
            trajectories = actors.rollout.generate(batch, step + 1)  # by the weights before this step's update
            scored = actors.reward.score(trajectories)
            update = actors.learner.update_held(step)  # one PPO update, while the others sample and score
            actors.learner.hold(scored)  # nobody can sample it again once the engines have other weights
            weights = actors.learner.publish()
            actors.rollout.load_weights(weights)
            run.end_step(step, update)


def run_with_refills(run: Run, actors: Actors) -> None:
    """Run PPO step after step, with further prompts in the place of groups whose scores are all equal.

    DAPO's dynamic sampling (arXiv 2503.14476, sec. 3.2), in the order of the prompts: a step's prompts follow from the
    position that it begins with, and from the scores. The learner leaves the flat groups out.
    """
    config, prompts = run.config, run.prompts
    size = config.rollout.responses_per_prompt
    with run.under_way(actors.learner.save, actors.reward.explain):
        for step in range(run.state.step, config.steps):
            evaluate_when_due(run, actors)
            batch = prompts.take(config.rollout.batch_size)
            rounds = [actors.reward.score(actors.rollout.generate(batch, step, keep_weights=True))]
            missing, num_refilled = actors.reward.count_flat(rounds[0]), 0
            for _ in range(config.rollout.max_refills if missing else 0):
                batch = prompts.take(missing * size, may_be_none=True)
                num_refilled += missing
                missing = batch.num_skipped
                if batch.sample_ids:
                    rounds.append(actors.reward.score(actors.rollout.generate(batch, step, keep_weights=True)))
                    missing += actors.reward.count_flat(rounds[-1])
                if not missing:
                    break
            update = actors.learner.update(Rounds(rounds, {"groups/num_refilled": float(num_refilled)}), step)
            weights = actors.learner.publish()
            actors.rollout.load_weights(weights)
            run.end_step(step, update)
