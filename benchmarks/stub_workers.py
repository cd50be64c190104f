"""Workers without models: they answer at once, with tables, figures and weights of the kind that the real ones make."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import xxhash

from ppo_ray import trajectory
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config
from ppo_ray.learner.ranks import Rendezvous
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.seeding import derive_seed
from ppo_ray.weights.acks import WeightAck
from ppo_ray.weights.manifest import TensorEntry, WeightManifest

RESPONSE_TOKENS = 16
NUM_METRICS = 40
"""About as many as a real update reports."""


@ray.remote(concurrency_groups=CONTROL)
class StubRollout(Worker):
    """Answers every prompt with the same tokens."""

    def setup(self, config: Config) -> dict[str, float]:
        self._version = -1
        return {"time/engine_start_s": 0.0}

    @ray.method(num_returns=2)
    def generate(
        self, prompts: PromptBatch, step: int, seed: int, keep_weights: bool
    ) -> tuple[pa.Table, dict[str, float]]:
        rows = [
            {
                "sample_id": sample_id,
                "step": step,
                "policy_version": self._version,
                "worker": self._name,
                "seed": derive_seed(seed, "sample", step, sample_id),
                "prompt": "a prompt",
                "response": "a response of some words",
                "prompt_ids": prompt_ids,
                "response_ids": range(RESPONSE_TOKENS),
                "rollout_logprobs": [-1.0] * RESPONSE_TOKENS,
                "finish_reason": "length",
            }
            for sample_id, prompt_ids in zip(prompts.sample_ids, prompts.prompt_ids, strict=True)
        ]
        return trajectory.from_rows(rows), {"time/generate_s": 0.0}

    def load_weights(self, manifest: WeightManifest, buckets: list[Any]) -> WeightAck:
        (bucket,) = ray.get(buckets, timeout=60)
        if xxhash.xxh3_64_hexdigest(bucket.data) != manifest.entries[0].checksum:
            raise ValueError("the weights are not those that were sent")
        self._version = manifest.policy_version
        return WeightAck(self._name, manifest.policy_version, manifest.checksum, 0.0)


@ray.remote(concurrency_groups=CONTROL)
class StubReward(Worker):
    """Scores every response 0.5."""

    def setup(self, config: Config) -> dict[str, float]:
        return {"time/reward_start_s": 0.0}

    @ray.method(num_returns=2)
    def score(self, table: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        return trajectory.with_scores(table, [0.5] * table.num_rows), {"time/score_s": 0.0}


@ray.remote(concurrency_groups=CONTROL)
class StubLearner(Worker):
    """Counts updates; its weights are a few bytes."""

    def sees(self, file: str, text: str) -> bool:
        return Path(file).read_text(encoding="utf-8") == text

    def open_rendezvous(self, host: str, timeout_s: float) -> Rendezvous:
        """Let several ranks be set up, which never talk to one another."""
        return Rendezvous(host, port=0, prefix="")

    def setup(self, config: Config, checkpoint: str | None, rendezvous: Any, rank: int) -> dict[str, float]:
        self._version, self._leads = 0, rank == 0
        return {"time/learner_start_s": 0.0}

    def num_buckets(self) -> int:
        return 1

    def update(self, step: int, path: str, *shards: pa.Table, num_refilled: int = 0) -> UpdateReport:
        """Take the shards for learnt if they are this step's batch, whole, in order, scored, of the weights in use."""
        table = trajectory.concat(shards)
        sample_ids = table.column("sample_id").to_numpy()
        versions = set(table.column("policy_version").to_pylist())
        whole = (sample_ids == np.arange(step * len(sample_ids), (step + 1) * len(sample_ids))).all()
        if not whole or table.column("score").null_count or versions != {self._version}:
            raise ValueError(f"not the batch of step {step}: samples {sample_ids}, policy versions {versions}")
        self._version += 1
        metrics = {f"stub/{index}": 0.0 for index in range(NUM_METRICS)}
        metrics |= {"score/mean": 0.5, "learner/skipped_update": 1.0, "stub/num_trajectories": len(sample_ids)}
        metrics |= {"rollout/staleness_max": 0.0, "time/learn_s": 0.0}
        return UpdateReport(step, metrics, 0.0)

    def publish(self, moved: bool = False) -> tuple[np.ndarray | None, WeightManifest, WeightAck]:
        bucket = np.full(4096, self._version % 256, np.uint8)
        entry = TensorEntry("weights", "uint8", bucket.shape, xxhash.xxh3_64_hexdigest(bucket.data))
        manifest = WeightManifest(self._version, "xxh3", (entry,))
        ack = WeightAck(self._name, self._version, manifest.checksum, 0.0)
        return bucket if self._leads else None, manifest, ack

    def save(self, path: str, *state: object) -> None:
        """Leave an empty checkpoint."""
        if self._leads:
            Path(path).mkdir(parents=True)

    def write(self) -> None:
        """Write nothing more."""
