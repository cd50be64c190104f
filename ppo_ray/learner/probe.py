"""A probe of whether an engine computes with the weights it is sent: it is sent weights that differ from the policy's.

An engine that acknowledges weights may still compute with others: a packed copy of a tied head, a stale cache, a layer
that was not reloaded; or without the adapters. So the probe moves every tensor that is trained by a tenth of its size,
lets the engine generate, and compares the engine's log-probabilities with the learner's under the moved weights and
under its own. Adapters, which begin with zeros, are moved by what makes a tenth of the weights that they adapt.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ppo_ray.learner.batch import Layout, ResponseBatch
from ppo_ray.learner.fsdp import gather_full, shard_like
from ppo_ray.learner.ranks import detect_lost_peers
from ppo_ray.learner.sharding import Sharding
from ppo_ray.machine import return_freed_memory
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.weights.acks import Agreement
from ppo_ray.weights.snapshot import Wire

_RELATIVE_MOVE = 0.1
_SMALLEST_SIZE = 0.01  # a tensor of zeros is moved too


@dataclass(frozen=True)
class WeightProbe:
    """A policy whose weights can be moved and put back; all ranks make the same calls."""

    policy: ActorCritic
    sharding: Sharding
    layout: Layout
    seed: int
    """Seed of the move."""
    wire: Wire
    """Precision that the moved weights are rounded to, as those that engines are sent."""

    def compare(self, table: pa.Table) -> list[Agreement]:
        """Compare what engines generated, a table of `trajectory.SCHEMA` of all workers; the policy is as it was."""
        batch = ResponseBatch.from_table(table, scored_only=False)
        own = self._logprobs(batch)
        with self.move():
            moved = self._logprobs(batch)
        names = np.array(table.column("worker").to_pylist())
        found = batch.rollout_logprobs.double()
        agreements = []
        for worker in sorted(set(names.tolist())):
            mask = batch.response_mask & torch.from_numpy(names == worker)[:, None]
            pairs = ((found, moved), (found, own), (moved, own))
            agreements.append(Agreement(worker, *(float((a - b).abs()[mask].mean()) for a, b in pairs)))
        return agreements

    @torch.no_grad()
    def _logprobs(self, batch: ResponseBatch) -> torch.Tensor:
        """Compute `[B, R]` float64 on the CPU."""
        logprobs = torch.zeros(batch.response_mask.shape, dtype=torch.float64, device=self.layout.device)
        with detect_lost_peers(self.layout.ranks.rank):
            for rows in self.layout.passes(batch, np.arange(batch.num_sequences)):
                output = self.policy(rows).logprobs
                logprobs[torch.from_numpy(rows.sequences).to(logprobs.device), : output.shape[1]] = output.double()
        self.layout.ranks.sum([logprobs])
        self.sharding.release_gathered(backward_follows=False)
        return logprobs.cpu()

    @contextlib.contextmanager
    @torch.no_grad()
    def move(self) -> Iterator[None]:
        """Move the policy's weights for the length of a block."""
        parameters = [parameter for parameter in self.policy.causal_lm.parameters() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in parameters]
        generator = torch.Generator(self.policy.device).manual_seed(self.seed)  # all ranks' GPUs draw the same
        sizes = self._size_adapters() if self.policy.adapted else {}
        try:
            for parameter in parameters:
                before = gather_full(parameter)
                size = sizes.get(parameter) or _RELATIVE_MOVE * max(_rms(before), _SMALLEST_SIZE)
                noise = torch.randn(before.shape, generator=generator, device=before.device)
                moved = before + (noise * size).to(before)
                if not self.policy.adapted:  # else the sum of both is rounded on its way
                    moved = moved.to(self.wire.dtype_of(moved))
                parameter.copy_(shard_like(moved, parameter))
            yield
        finally:
            for parameter in reversed(parameters):
                parameter.copy_(kept.pop())
            return_freed_memory()  # else the updates need new memory beside the gaps that these copies leave

    def _size_adapters(self) -> dict[torch.nn.Parameter, float]:
        """Return the size of the move of each B, with which scale x B A moves by a tenth of the size of W."""
        from ppo_ray.models.lora import adapter_layers, matrices

        sizes = {}
        for layer in adapter_layers(self.policy.causal_lm).values():
            a, b, scale = matrices(layer)
            weight = _rms(gather_full(layer.get_base_layer().weight))
            each = scale * max(_rms(gather_full(a)), _SMALLEST_SIZE) * a.shape[0] ** 0.5
            sizes[b] = _RELATIVE_MOVE * max(weight, _SMALLEST_SIZE) / each
        return sizes


def _rms(tensor: torch.Tensor) -> float:
    """Return the root of a tensor's mean square."""
    return float(tensor.float().square().mean().sqrt())
