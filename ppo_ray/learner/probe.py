"""Proof that an engine computes with the weights it is sent: weights that differ from the policy's are sent to it.

An engine that acknowledges weights may still compute with others: a packed copy of a tied head, a stale cache, a layer
that was not reloaded. So the probe moves every tensor by a tenth of its size, lets the engine generate, and compares
the engine's log-probabilities with the learner's under the moved weights and under its own.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.learner.batch import Layout, ResponseBatch
from ppo_ray.learner.ranks import peers_needed
from ppo_ray.learner.sharding import Sharding, like, whole
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.weights.wire import Wire

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean difference of log-probabilities, nats a token, by the coarser dtype of both; measured: 1e-5, 0.03."""


@dataclass(frozen=True)
class Agreement:
    """Mean absolute differences of log-probabilities of the tokens an engine sampled, nats a token."""

    worker: str
    to_moved: float
    """Of the engine and the learner under the moved weights."""
    to_own: float
    """Of the engine and the learner under its own weights."""
    move: float
    """Of the learner under the two: how much there was to see."""


def disagreement(agreement: Agreement, dtype: str) -> str | None:
    """Say what is wrong with an engine; None if it computes with what it was sent. `dtype`: the coarser of the two."""
    tolerance = TOLERANCE[dtype]
    seen = f"{agreement.to_moved:.1e} nats a token off the learner with the weights it was sent"
    if math.isnan(agreement.to_moved) or agreement.to_moved > tolerance:
        before = "; it still computes with those before" if agreement.to_own <= tolerance else ""
        return f"{agreement.worker} is {seen} (at most {tolerance:g} in {dtype}){before}"
    if agreement.to_own < 5 * agreement.to_moved:
        return f"{agreement.worker} is {seen} and {agreement.to_own:.1e} off with the ones before: it cannot be told"
    return None


_RELATIVE_MOVE = 0.1
_SMALLEST_SIZE = 0.01  # a tensor of zeros is moved too


@dataclass(frozen=True)
class WeightProbe:
    """The policy, and the policy moved; all ranks make the same calls."""

    policy: ResponseLM
    sharding: Sharding
    layout: Layout
    seed: int
    """Of the move."""
    wire: Wire
    """What the moved weights are rounded to, as those that engines are sent."""

    def compare(self, table: pa.Table) -> list[Agreement]:
        """Compare what engines generated, a table of `trajectory.SCHEMA` of all workers; the policy is as it was."""
        batch = ResponseBatch.from_table(trajectory.with_scores(table, [0.0] * table.num_rows))
        own = self._logprobs(batch)
        with self.moved():
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
        with peers_needed(self.layout.ranks.rank):
            for rows in self.layout.passes(batch, np.arange(batch.num_sequences)):
                output = self.policy(rows).logprobs
                logprobs[torch.from_numpy(rows.sequences).to(logprobs.device), : output.shape[1]] = output.double()
        self.layout.ranks.sum([logprobs])
        self.sharding.evaluated(backward_follows=False)
        return logprobs.cpu()

    @contextlib.contextmanager
    @torch.no_grad()
    def moved(self) -> Iterator[None]:
        """Move the policy's weights for the length of a block."""
        parameters = list(self.policy.causal_lm.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        generator = torch.Generator().manual_seed(self.seed)
        try:
            for parameter in parameters:
                before = whole(parameter)
                size = max(float(before.square().mean().sqrt()), _SMALLEST_SIZE)
                noise = torch.randn(before.shape, generator=generator)
                moved = before + (noise * (_RELATIVE_MOVE * size)).to(before)
                parameter.copy_(like(moved.to(self.wire.dtype_of(moved)), parameter))
            yield
        finally:
            for parameter, original in zip(parameters, kept, strict=True):
                parameter.copy_(original)
