"""The rollout workers as the driver sees them: what the loop calls `rollout`."""

from dataclasses import replace
from typing import Any, Protocol

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import Seats
from ppo_ray.actors.shards import ShardCall, Shards
from ppo_ray.actors.watch import Member
from ppo_ray.config import Config
from ppo_ray.events import Report
from ppo_ray.plan import ActorSpec, make_request
from ppo_ray.plan.demand import actor_name, actor_specs
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.rollout.actor import RolloutWorker
from ppo_ray.weights.acks import Agreement, PublishedWeights, check_acks, check_agreements
from ppo_ray.weights.transports import make_transport


def rollout_spec(config: Config) -> ActorSpec:
    """Return the resources of the rollout workers; vLLM reads its environment when their process imports it."""
    spec = actor_specs(config)["rollout"]
    if config.rollout.engine == "hf":
        return replace(spec, modules=("ppo_ray.rollout.hf",), forks=True)
    from ppo_ray.rollout.vllm import engine_environment

    environment = engine_environment(config.rollout.gpus)
    if config.rollout.batch_invariant:
        environment |= {"VLLM_BATCH_INVARIANT": "1"}
    if spec.ranks > 1:
        gpus = make_request(config).seat(actor_name("rollout", 0)).gpus
        bundles = ",".join(map(str, range(spec.ranks)))
        environment |= {"VLLM_RAY_BUNDLE_INDICES": bundles, "VLLM_RAY_PER_WORKER_GPUS": f"{gpus:g}"}
    modules = ("vllm", "ppo_ray.rollout.vllm")
    return replace(spec, environment=environment, modules=modules, forks=spec.ranks == 1)


class Learner(Protocol):
    """The learner, as far as a check of the engines needs it."""

    def publish(self, moved: bool = False) -> PublishedWeights:
        """Make the weights ready to be sent; `moved`: others than the policy's."""
        ...

    def compare(self, generated: Shards) -> list[Agreement]:
        """Compare every engine's log-probabilities of what it generated with the learner's."""
        ...


class RolloutGroup:
    """All rollout workers."""

    def __init__(self, config: Config, report: Report, seats: Seats | None = None, worker: Any = RolloutWorker) -> None:
        """Create the workers, actors of a class; `setup` starts their engines."""
        self._config = config
        self._group = ActorGroup(worker, rollout_spec(config), config.ray, report, seats)
        self._group.catch_up = self._catch_up
        self._weights: PublishedWeights | None = None
        self._weight_metrics: dict[str, float] = {}
        self._sync_metrics: dict[str, dict[str, float]] = {}
        self._transport = make_transport(config)

    def setup(self) -> list[dict[str, float]]:
        """Start all engines at once and wait until they are ready."""
        return self._group.setup(self._config)

    def describe_limits(self) -> str | None:
        """Say by how much the engines' memory for keys and values makes generation wait; None: it does not."""
        answers: list[str | None] = self._group.call("telling limits", lambda handle: handle.describe_limits.remote())
        return answers[0]

    def generate(self, prompts: PromptBatch, step: int, seed: int | None = None, keep_weights: bool = False) -> Shards:
        """Deal the prompts out in order, one shard per worker, and begin to sample; returns at once.

        The metrics of the shards tell how long the weights that sample them took to arrive.

        Args:
            prompts: what is answered.
            step: of the run.
            seed: that the samples are drawn from; None: the run's.
            keep_weights: whether the engines are asked again before new weights come. A colocated engine copies them to
                the host then, else it may drop them. One that is asked all the same is replaced.
        """
        seed = self._config.seed if seed is None else seed
        shards = prompts.split(self._config.rollout.workers)
        calls = [_generate_call(shard, step, seed, keep_weights) for shard in shards]
        timeout_s = self._config.ray.call_timeout_s
        of_weights, of_workers = self._weight_metrics, self._sync_metrics
        return Shards(self._group, "generating", calls, timeout_s, metrics=of_weights, of_workers=of_workers)

    def load_weights(self, weights: PublishedWeights) -> float:
        """Send weights to every engine and check that each serves them.

        A worker that is lost meanwhile is replaced, and its successor gets the same weights.

        Returns:
            The seconds of the slowest engine.

        Raises:
            WorkerError: a worker failed, or acknowledged another version or checksum.
            WorkerLost: the learner is gone, and with it the weights.
        """
        self._weights = weights
        acks = self._transport.send(weights, self._group)
        check_acks(weights, acks)
        seconds = max(ack.seconds for ack in acks)
        self._sync_metrics = {ack.worker: {"time/sync_s": ack.seconds} for ack in acks}
        self._weight_metrics = {"time/publish_s": weights.publish_s, "time/sync_s": seconds}
        return seconds

    def check_engines(self, learner: Learner, prompts: PromptBatch) -> list[Agreement]:
        """Prove that new weights change what every engine computes as they change what the learner computes.

        Weights that differ from the policy's are sent to all engines, which generate for the prompts; their
        log-probabilities must be the learner's under those weights, and no others. The engines have these weights
        afterwards: send them the policy's.

        Returns:
            What was found of each worker.

        Raises:
            WorkerError: an engine does not compute with what it was sent; names it.
        """
        weights = learner.publish(moved=True)
        self.load_weights(weights)
        if self._config.ray.placement == "colocated":  # what engines compute after they have dropped weights, too
            self.generate(prompts, 0).wait()
            self.load_weights(weights)
        calls = [_generate_call(prompts, 0, self._config.seed)] * self._config.rollout.workers
        timeout_s = self._config.ray.call_timeout_s
        agreements = learner.compare(Shards(self._group, "generating for a check", calls, timeout_s))
        model, rollout = self._config.model, self._config.rollout
        dtypes = [model.dtype, rollout.engine_dtype]
        if model.lora is not None:  # what is sent is rounded on its way, which the learner's own are not
            dtypes.append(rollout.wire_dtype or model.dtype)
        check_agreements(agreements, "bfloat16" if "bfloat16" in dtypes else "float32")
        return agreements

    def close(self) -> None:
        """End the workers."""
        self._group.close()

    def _catch_up(self, member: Member) -> None:
        """Send a replacement the weights that the others have, and check that it serves them."""
        if self._weights is not None:
            check_acks(self._weights, [self._transport.send_to(self._weights, self._group, member)])


def _generate_call(shard: PromptBatch, step: int, seed: int, keep_weights: bool = False) -> ShardCall:
    return lambda handle, _: handle.generate.remote(shard, step, seed, keep_weights)
