"""PPOLearner: policy, value head, frozen reference, optimizer and KL controller; one PPO update at a time.

Dimensions: B sequences, R response tokens. TRL 0.11's `PPOTrainer.step` is the yardstick (`tests/golden`), with two
differences meant: losses are sums over the mini-batch's tokens, so that micro-batches never change the gradient, and a
mini-batch whose mean ratio is too large makes no optimizer step at all.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.algo.gae import gae
from ppo_ray.algo.kl import AdaptiveKLController, FixedKLController, KLController, kl_estimate
from ppo_ray.algo.losses import clipped_surrogate, clipped_value_loss
from ppo_ray.algo.masked import masked_sum, masked_whiten
from ppo_ray.algo.rewards import token_rewards
from ppo_ray.batch import ResponseBatch, split_evenly
from ppo_ray.config import LearnerConfig, ModelConfig, PPOConfig
from ppo_ray.diagnostics import (
    Experience,
    MinibatchReport,
    MinibatchSums,
    experience_metrics,
    table_metrics,
    update_metrics,
)
from ppo_ray.errors import WorkerError
from ppo_ray.models.loading import default_device, load_causal_lm, load_tokenizer
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.value_head import VALUE_HEAD_FILE, CausalLMWithValueHead
from ppo_ray.seeding import derive_seed
from ppo_ray.weights import WeightSnapshot

_ROW_WIDTH = 64  # tokens; wide enough for little padding, narrow enough for cheap attention


@dataclass(frozen=True)
class Update:
    """What an update returns."""

    metrics: dict[str, float]
    trajectories: pa.Table
    """Of `trajectory.LEARNED_SCHEMA`, in the order given."""


class PPOLearner:
    """Trains a policy; knows no Ray. Not thread-safe: one call at a time."""

    def __init__(
        self,
        model: ModelConfig,
        ppo: PPOConfig,
        learner: LearnerConfig,
        temperature: float = 1.0,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """Load policy and reference and make the optimizer.

        Parameters are kept in float32; `model.dtype="bfloat16"` computes the forward passes in bfloat16, because
        steps of 1e-5 are lost in bfloat16 weights.

        Args:
            model: a `value_head.safetensors` beside the policy is loaded, else the value head starts from the seed.
            ppo: the algorithm.
            learner: its micro-batches.
            temperature: that responses are sampled at.
            seed: of the run.
            device: None takes the GPU if there is one.

        Raises:
            InputError: a model cannot be loaded or is not supported.
        """
        self.policy_version = 0
        self._ppo, self._learner, self._seed = ppo, learner, seed
        self._device = torch.device(device) if device is not None else default_device()
        self._tokenizer = load_tokenizer(model.path)
        storage = "float32" if model.dtype == "bfloat16" else model.dtype
        causal_lm = load_causal_lm(model.path, dtype=storage, device=self._device)
        self._policy = CausalLMWithValueHead(causal_lm, temperature, model.dtype, derive_seed(seed, "value_head"))
        value_head = Path(model.path) / VALUE_HEAD_FILE
        if value_head.is_file():
            self._policy.load_value_head(value_head)
        reference = load_causal_lm(model.reference_path or model.path, dtype=storage, device=self._device)
        self._reference = ResponseLM(reference, temperature, model.dtype).requires_grad_(False)
        self._row_width = _ROW_WIDTH if self._policy.packs and self._reference.packs else 0
        self._optimizer = torch.optim.Adam(
            self._policy.parameters(), lr=ppo.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True
        )
        self._controller: KLController = FixedKLController(ppo.kl_coef)
        if ppo.kl_controller == "adaptive":
            self._controller = AdaptiveKLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty in the next update."""
        return self._controller.kl_coef

    def update(self, trajectories: pa.Table, step: int) -> Update:
        """Make one PPO update on all scored trajectories of a step.

        Trajectories without a score are counted and left out. With fewer than two response tokens left nothing is
        learnt, the metrics say so (`learner/skipped_update`), and the version advances all the same.

        Args:
            trajectories: of `trajectory.SCHEMA`.
            step: addresses the order of mini-batches.

        Raises:
            ValueError: the table is not what the exchange promises.
            WorkerError: the loss or its gradient is not finite; the weights are as before that mini-batch.
        """
        batch = ResponseBatch.from_table(trajectories)
        metrics = table_metrics(trajectories, batch) | {"learner/learning_rate": self._ppo.learning_rate}
        self.policy_version += 1
        if batch.num_response_tokens.sum() < 2:
            nothing = dict.fromkeys(trajectory.LEARNED_FIELDS, [None] * trajectories.num_rows)
            metrics |= {"kl/coef": self.kl_coef, "learner/skipped_update": 1.0}
            return Update(metrics, trajectory.with_learned(trajectories, nothing))
        started = time.perf_counter()
        experience = self._experience(batch)
        metrics |= experience_metrics(experience, batch, self.kl_coef)
        evaluated = time.perf_counter()
        reports = self._optimize(batch, experience, step)
        metrics |= update_metrics(reports, metrics["returns/std"])
        self._controller = self._controller.updated(metrics["kl/per_sequence"], batch.num_sequences)
        metrics |= {
            "learner/skipped_update": 0.0,
            "time/old_s": evaluated - started,
            "time/update_s": time.perf_counter() - evaluated,
        }
        learned = {name: batch.to_lists(getattr(experience, name)) for name in trajectory.LEARNED_FIELDS}
        return Update(metrics, trajectory.with_learned(trajectories, learned))

    def weights(self) -> WeightSnapshot:
        """Copy the policy's weights, by their Hugging Face names; a tied head is listed once."""
        return WeightSnapshot.take(self._policy.causal_lm.named_parameters(), self.policy_version)

    def save(self, path: Path) -> None:
        """Write the policy and its tokenizer for `from_pretrained`, and the value head beside them."""
        path.mkdir(parents=True, exist_ok=True)
        self._policy.causal_lm.save_pretrained(path)
        self._tokenizer.save_pretrained(path)
        self._policy.save_value_head(path / VALUE_HEAD_FILE)

    def _experience(self, batch: ResponseBatch) -> Experience:
        """Evaluate policy and reference on the batch and work out rewards, advantages and returns."""
        mask = batch.response_mask.to(self._device)
        dtype = self._policy.value_head.weight.dtype
        old_logprobs, ref_logprobs, values = torch.zeros(3, *mask.shape, dtype=dtype, device=self._device)
        with torch.inference_mode():
            for rows in self._microbatches(batch, np.arange(batch.num_sequences)):
                index = torch.from_numpy(rows.sequences).to(self._device)
                columns = slice(rows.response_mask.shape[1])
                output, reference = self._policy(rows), self._reference(rows)
                old_logprobs[index, columns] = output.logprobs
                ref_logprobs[index, columns] = reference.logprobs
                values[index, columns] = output.values
        kl = kl_estimate(old_logprobs, ref_logprobs, mask)
        rewards = token_rewards(kl, batch.scores.to(self._device, dtype), mask, self.kl_coef)
        whitened = masked_whiten(rewards, mask, shift_mean=False) if self._ppo.whiten_rewards else rewards
        advantages, returns = gae(whitened, values, mask, self._ppo.gamma, self._ppo.gae_lambda)
        if self._ppo.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        return Experience(old_logprobs, ref_logprobs, values, kl, rewards, advantages, returns)

    def _optimize(self, batch: ResponseBatch, experience: Experience, step: int) -> list[MinibatchReport]:
        """Go through the batch `epochs` times, each time in another order of rows."""
        reports = []
        for epoch in range(self._ppo.epochs):
            generator = np.random.default_rng(derive_seed(self._seed, "epoch", step, epoch))
            order = generator.permutation(batch.num_sequences)
            for sequences in split_evenly(order, self._ppo.minibatch_size or batch.num_sequences):
                reports.append(self._minibatch(batch, experience, sequences, f"step {step}, epoch {epoch}"))
        return reports

    def _minibatch(
        self, batch: ResponseBatch, experience: Experience, sequences: np.ndarray, where: str
    ) -> MinibatchReport:
        """Add up the gradients of a mini-batch's micro-batches and make one optimizer step.

        Whether the mean ratio exceeds the threshold is known when all gradients are there; they are dropped then. (TRL
        multiplies the loss by zero and steps all the same, so that Adam's momentum still moves the weights.)
        """
        sums = self._accumulate(batch, experience, sequences)
        report = sums.report()
        if report.ratio_mean > self._ppo.ratio_threshold:
            self._optimizer.zero_grad()
            return replace(report, skipped=True)
        gradients = [parameter.grad for parameter in self._policy.parameters() if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        report = replace(report, grad_norm=float(grad_norm))
        if not np.isfinite([report.total_loss, report.grad_norm]).all():
            self._optimizer.zero_grad()
            raise WorkerError(
                f"learner: at {where} the loss is {report.total_loss} and its gradient's norm {report.grad_norm}. "
                f"Lower ppo.learning_rate={self._ppo.learning_rate} or set ppo.max_grad_norm, and look at the scores."
            )
        if self._ppo.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._policy.parameters(), self._ppo.max_grad_norm, grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return report

    def _accumulate(self, batch: ResponseBatch, experience: Experience, sequences: np.ndarray) -> MinibatchSums:
        """Run all micro-batches of a mini-batch forwards and backwards; their gradients add up in the parameters."""
        ppo = self._ppo
        num_tokens = int(batch.num_response_tokens[sequences].sum())
        sums = MinibatchSums(num_tokens, ppo.value_coef)
        for rows in self._microbatches(batch, sequences):
            index = torch.from_numpy(rows.sequences).to(self._device)
            columns, mask = slice(rows.response_mask.shape[1]), rows.response_mask
            old_logprobs, old_values, advantages, returns = (
                figure[index, columns]
                for figure in (experience.old_logprobs, experience.values, experience.advantages, experience.returns)
            )
            output = self._policy(rows)
            policy = clipped_surrogate(output.logprobs, old_logprobs, advantages, mask, ppo.clip_range, num_tokens)
            value = clipped_value_loss(output.values, old_values, returns, mask, ppo.value_clip_range, num_tokens)
            (policy.loss + ppo.value_coef * value.loss).backward()
            sums.add(policy, value, masked_sum(output.entropies, mask))
        return sums

    def _microbatches(self, batch: ResponseBatch, sequences: np.ndarray) -> Iterator[PackedRows]:
        return batch.microbatches(sequences, self._learner.microbatch_tokens, self._row_width, self._device)
