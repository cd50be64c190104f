"""Rollout workers: a shell over `Engine` that turns prompts into trajectories."""

import time
from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import Seats, rollout_spec
from ppo_ray.actors.shards import ShardCall, Shards
from ppo_ray.actors.transports import make_transport
from ppo_ray.actors.transports.ipc import merged
from ppo_ray.actors.transports.object_store import Fetched
from ppo_ray.actors.watch import Member
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config, RolloutConfig, weight_transport
from ppo_ray.engines.base import Engine, Receiver, Request, Sampling
from ppo_ray.events import Report
from ppo_ray.prompts import PromptBatch
from ppo_ray.seeding import derive_seed
from ppo_ray.weights import PublishedWeights, WeightAck, WeightManifest, WeightSnapshot, check_acks


@ray.remote(concurrency_groups=CONTROL)
class RolloutWorker(Worker):
    """Samples responses with one engine."""

    def setup(self, config: Config) -> dict[str, float]:
        """Start the engine and load the tokenizer; returns the seconds it took, by part."""
        from ppo_ray.models.loading import load_tokenizer

        start = time.perf_counter()
        self._config, self._engine = config, _start_engine(config)
        if weight_transport(config) == "ipc":
            self.connect({"packed": False})
        self._tokenizer = load_tokenizer(config.model.path, config.model.trust)
        stop_ids = (self._tokenizer.eos_token_id,) if config.rollout.stop_at_eos else ()
        self._sampling = Sampling(config.rollout.temperature, stop_ids)
        self._rest()
        return {"time/engine_start_s": time.perf_counter() - start}

    @ray.method(num_returns=2)
    def generate(self, prompts: PromptBatch, step: int, seed: int) -> tuple[pa.Table, dict[str, float]]:
        """Sample one response a prompt; returns a table of `trajectory.SCHEMA`, without scores, and metrics."""
        start = time.perf_counter()
        limits = prompts.max_response_tokens or drawn_limits(self._config.rollout, seed, step, prompts.sample_ids)
        requests = [
            Request(tuple(prompt_ids), limit, derive_seed(seed, "sample", step, sample_id))
            for sample_id, prompt_ids, limit in zip(prompts.sample_ids, prompts.prompt_ids, limits, strict=True)
        ]
        completions = self._engine.generate(requests, self._sampling)
        self._rest()
        rows = [
            {
                "sample_id": sample_id,
                "step": step,
                "policy_version": self._engine.policy_version,
                "worker": self._name,
                "seed": request.seed,
                "prompt_ids": request.prompt_ids,
                "response_ids": completion.response_ids,
                "rollout_logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason,
                **self._texts(request.prompt_ids, completion.response_ids),
            }
            for sample_id, request, completion in zip(prompts.sample_ids, requests, completions, strict=True)
        ]
        return trajectory.from_rows(rows), {"time/generate_s": time.perf_counter() - start}

    def load_weights(self, manifest: WeightManifest, buckets: list[Any]) -> WeightAck:
        """Serve the weights in these buckets, references to objects of the store, from now on, and say so."""
        start = time.perf_counter()
        fetched = Fetched(buckets, self._config.ray.call_timeout_s)
        self._engine.load_weights(WeightSnapshot(manifest, fetched))
        return self._ack(manifest, start)

    def connect(self, init_info: dict[str, Any]) -> None:
        """Make ready to receive weights by NCCL or CUDA IPC; see `Receiver.connect`."""
        cast("Receiver", self._engine).connect(init_info)

    def receive_weights(self, manifest: WeightManifest, *exports: list[dict[str, Any]]) -> WeightAck:
        """Receive weights by NCCL, or from what learner ranks export by CUDA IPC; serve them, and say so."""
        start = time.perf_counter()
        handles = {"ipc_handles": merged(exports)} if exports else {}
        cast("Receiver", self._engine).receive_weights(manifest, handles)
        return self._ack(manifest, start)

    def close(self) -> None:
        """Free the engine."""
        if hasattr(self, "_engine"):
            self._engine.close()

    def _rest(self) -> None:
        """Leave the GPU to those that share it, until this worker's next turn."""
        if self._config.ray.placement == "colocated":
            self._engine.sleep()

    def _ack(self, manifest: WeightManifest, start: float) -> WeightAck:
        seconds = time.perf_counter() - start
        return WeightAck(self._name, self._engine.policy_version, manifest.checksum, seconds)

    def _texts(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> dict[str, str]:
        """Decode the whole once, so that a character whose bytes span prompt and response stays whole."""
        prompt = self._tokenizer.decode(prompt_ids, skip_special_tokens=True)
        text = self._tokenizer.decode([*prompt_ids, *response_ids], skip_special_tokens=True)
        if text.startswith(prompt):
            return {"prompt": prompt, "response": text[len(prompt) :]}
        return {"prompt": "", "response": text}


def drawn_limits(rollout: RolloutConfig, seed: int, step: int, sample_ids: Sequence[int]) -> list[int]:
    """Draw the limit of each response, tokens, from its address."""
    shortest, longest = rollout.min_response_tokens, rollout.max_response_tokens
    draws = [derive_seed(seed, "response_length", step, sample_id) for sample_id in sample_ids]
    return [shortest + draw % (longest - shortest + 1) for draw in draws]


class RolloutGroup:
    """All rollout workers; what the loop calls `rollout`."""

    def __init__(self, config: Config, report: Report, seats: Seats | None = None, worker: Any = RolloutWorker) -> None:
        """Create the workers, actors of a class; `setup` starts their engines."""
        self._config = config
        self._group = ActorGroup(worker, rollout_spec(config), config.ray, report, seats)
        self._group.brought_up = self._catch_up
        self._weights: PublishedWeights | None = None
        self._transport = make_transport(config)

    def setup(self) -> list[dict[str, float]]:
        """Start all engines at once and wait until they are ready."""
        return self._group.setup(self._config)

    def generate(self, prompts: PromptBatch, step: int, seed: int | None = None) -> Shards:
        """Deal the prompts out in order, a shard a worker; returns at once."""
        seed = self._config.seed if seed is None else seed
        shards = prompts.split(self._config.rollout.workers)
        calls = [_generate_call(shard, step, seed) for shard in shards]
        return Shards(self._group, "generating", calls, self._config.ray.call_timeout_s)

    def generate_everywhere(self, prompts: PromptBatch, seed: int) -> Shards:
        """Let every worker generate for all of the prompts, a shard a worker: for comparing workers."""
        calls = [_generate_call(prompts, 0, seed)] * self._config.rollout.workers
        return Shards(self._group, "generating for a check", calls, self._config.ray.call_timeout_s)

    def load_weights(self, weights: PublishedWeights) -> dict[str, float]:
        """Send weights to every engine and check that each serves them.

        A worker that is lost meanwhile is replaced, and its successor gets the same weights.

        Raises:
            WorkerError: a worker failed, or acknowledged another version or checksum.
            WorkerLost: the learner is gone, and with it the weights.
        """
        self._weights = weights
        acks = self._transport.send(weights, self._group)
        check_acks(weights, acks)
        return {"time/sync_s": max(ack.load_s for ack in acks)}

    def close(self) -> None:
        """End the workers."""
        self._group.close()

    def _catch_up(self, member: Member) -> None:
        """Give a replacement the weights that the others have, verified."""
        if self._weights is not None:
            check_acks(self._weights, [self._transport.send_to(self._weights, self._group, member)])


def _generate_call(shard: PromptBatch, step: int, seed: int) -> ShardCall:
    return lambda handle, _: handle.generate.remote(shard, step, seed)


def _start_engine(config: Config) -> Engine:
    """Start the engine that `rollout.engine` names."""
    rollout = config.rollout
    if rollout.engine == "hf":
        from ppo_ray.engines.hf import HFEngine

        return HFEngine(
            config.model.path, dtype=rollout.dtype, max_context=rollout.max_context, trust=config.model.trust
        )
    from ppo_ray.engines.vllm import VLLMEngine

    return VLLMEngine(
        config.model.path,
        dtype=rollout.dtype,
        max_context=rollout.max_context,
        kv_cache_mib=rollout.kv_cache_mib,
        tensor_parallel=rollout.tensor_parallel,
        may_sleep=config.ray.placement == "colocated",
        trust=config.model.trust,
        transport=weight_transport(config),
    )
