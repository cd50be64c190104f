"""Rollout workers: a shell over `Engine` that turns prompts into trajectories."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config, RolloutConfig, weight_transport
from ppo_ray.models.tokens import decode_pair, read_end_tokens
from ppo_ray.plan.adapters import sends_adapters
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.rollout.engine import Engine, GenerationRequest, Receiver, Sampling
from ppo_ray.seeding import derive_seed
from ppo_ray.weights.acks import WeightAck
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import WeightSnapshot
from ppo_ray.weights.transports import RemoteBuckets


@ray.remote(concurrency_groups=CONTROL)
class RolloutWorker(Worker):
    """Samples responses with one engine."""

    def setup(self, config: Config) -> dict[str, float]:
        """Start the engine and load the tokenizer; returns the seconds it took, by part."""
        from ppo_ray.models.loading import check_gpu, load_tokenizer  # loads torch

        start = time.perf_counter()
        check_gpu("rollout.gpus", config.rollout.gpus)
        self._config = config
        with _whole_model(config) as path:
            self._engine, self._waits = _start_engine(config, path)
        self._tokenizer = load_tokenizer(config.model.path, config.model.trust)
        ends = read_end_tokens(config, self._tokenizer)
        self._sampling = Sampling(config.rollout.temperature, ends.ids)
        self._rest()
        return {"time/engine_start_s": time.perf_counter() - start}

    def describe_limits(self) -> str | None:
        """Say by how much the engine's memory for keys and values makes generation wait; None: it does not."""
        return self._waits

    @ray.method(num_returns=2)
    def generate(
        self, prompts: PromptBatch, step: int, seed: int, keep_weights: bool = True
    ) -> tuple[pa.Table, dict[str, float]]:
        """Sample one response per row; returns a table of `trajectory.SCHEMA`, without scores, and metrics.

        Args:
            prompts: what is answered.
            step: of the run.
            seed: of the run, or of an evaluation.
            keep_weights: as in `RolloutGroup.generate`.
        """
        start = time.perf_counter()
        limits = prompts.max_response_tokens or draw_limits(self._config.rollout, seed, step, prompts.addresses)
        requests = [
            GenerationRequest(
                tuple(prompt_ids), limit, derive_seed(seed, "sample", step, *address), f"sample {sample_id}"
            )
            for sample_id, address, prompt_ids, limit in zip(
                prompts.sample_ids, prompts.addresses, prompts.prompt_ids, limits, strict=True
            )
        ]
        sampling = self._sampling
        if prompts.temperature is not None:
            sampling = replace(sampling, temperature=prompts.temperature)
        completions = self._engine.generate(requests, sampling)
        self._rest(keep_weights)
        rows = []
        for sample_id, request, completion in zip(prompts.sample_ids, requests, completions, strict=True):
            prompt, response = decode_pair(self._tokenizer, request.prompt_ids, completion.response_ids)
            rows.append(
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
                    "prompt": prompt,
                    "response": response,
                }
            )
        table = trajectory.from_rows(rows, prompts.columns)
        return table, {"time/generate_s": time.perf_counter() - start, **self.measure_memory()}

    def load_weights(self, manifest: WeightManifest, buckets: list[Any]) -> WeightAck:
        """Serve the weights in these buckets, references to objects of the store, from now on, and say so."""
        start = time.perf_counter()
        fetched = RemoteBuckets(buckets, self._config.ray.call_timeout_s)
        self._engine.load_weights(WeightSnapshot(manifest, fetched))
        return self._ack(manifest, start)

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join a NCCL group with the learner; see `Receiver.connect`."""
        cast("Receiver", self._engine).connect(init_info)

    def receive_weights(self, manifest: WeightManifest) -> WeightAck:
        """Receive weights by NCCL; serve them, and say so."""
        start = time.perf_counter()
        cast("Receiver", self._engine).receive_weights(manifest)
        return self._ack(manifest, start)

    def map_weights(self, manifest: WeightManifest, bucket: int, *handles: dict[str, Any]) -> WeightAck:
        """Read a bucket that learner ranks lend by CUDA IPC; with the last, serve the weights. Say which are served."""
        start = time.perf_counter()
        by_gpu = {gpu: handle for of_rank in handles for gpu, handle in of_rank.items()}
        cast("Receiver", self._engine).map_weights(manifest, bucket, by_gpu)
        return self._ack(manifest, start)

    def close(self) -> None:
        """Free the engine."""
        if hasattr(self, "_engine"):
            self._engine.close()

    def _rest(self, keep_weights: bool = True) -> None:
        """Leave the GPU to those that share it, until this worker's next turn."""
        if self._config.ray.placement == "colocated":
            self._engine.sleep(keep_weights)

    def _ack(self, manifest: WeightManifest, start: float) -> WeightAck:
        seconds = time.perf_counter() - start
        return WeightAck(self._name, self._engine.policy_version, manifest.checksum, seconds)


def draw_limits(rollout: RolloutConfig, seed: int, step: int, addresses: Sequence[tuple[int, ...]]) -> list[int]:
    """Draw the limit of each response, tokens, from its address; see `PromptBatch.addresses`."""
    longest = rollout.max_response_tokens
    shortest = longest if rollout.min_response_tokens is None else rollout.min_response_tokens
    draws = [derive_seed(seed, "response_length", step, *address) for address in addresses]
    return [shortest + draw % (longest - shortest + 1) for draw in draws]


@contextlib.contextmanager
def _whole_model(config: Config) -> Iterator[str]:
    """Yield the folder or hub name of what an engine begins with: adapters are merged, unless they will be sent."""
    if config.model.lora is None or config.model.lora.path is None or sends_adapters(config):
        yield config.model.path
        return
    from ppo_ray.models.merging import merge_model  # loads torch

    with tempfile.TemporaryDirectory(prefix="ppo_ray-") as folder:
        merge_model(config.model, Path(folder), config.rollout.engine_dtype)
        yield folder


def _start_engine(config: Config, path: str) -> tuple[Engine, str | None]:
    """Start the engine that `rollout.engine` names; also returns what `RolloutWorker.describe_limits` does."""
    rollout, trust = config.rollout, config.model.trust
    trust = trust if path == config.model.path else replace(trust, revision=None)
    lora = config.model.lora if sends_adapters(config) else None
    if rollout.engine == "hf":
        from ppo_ray.rollout.hf import HFEngine

        size = config.max_context
        return HFEngine(path, dtype=rollout.engine_dtype, max_context=size, trust=trust, lora=lora), None
    import torch

    from ppo_ray.models.adapter_files import read_adapter_shapes
    from ppo_ray.plan import ModelSizes
    from ppo_ray.plan.engine import kv_cache_term, waiting_problem
    from ppo_ray.rollout.vllm import VLLMEngine

    kv_cache_mib = rollout.kv_cache_mib
    if kv_cache_mib is None:
        here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        kv_cache_mib = kv_cache_term(config, ModelSizes.read(config), here).num_bytes >> 20
    engine = VLLMEngine(
        path,
        dtype=rollout.engine_dtype,
        max_context=config.max_context,
        max_num_seqs=rollout.num_decoded,
        kv_cache_mib=kv_cache_mib,
        tensor_parallel=rollout.tensor_parallel,
        may_sleep=config.ray.placement == "colocated",
        trust=trust,
        transport=weight_transport(config),
        adapters=None if lora is None else read_adapter_shapes(config.model),
    )
    return engine, waiting_problem(config, engine.num_cached, kv_cache_mib)
