"""A step's scored trajectories: as padded tensors and back, in forward passes, in mini-batches, and in metrics.

Dimensions: N trajectories of the table, B of them with a score, R response tokens (the longest of the batch).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ppo_ray import trajectory
from ppo_ray.config import SOURCE
from ppo_ray.errors import WorkerError
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.packing import (
    SHORTEST_SHARED,
    PackedRows,
    Row,
    balance,
    join_prompts,
    make_microbatches,
    pack,
)
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.seeding import derive_seed

_ROW_WIDTH = 64  # tokens; wide enough for little padding, narrow enough for cheap attention


@dataclass(frozen=True)
class ResponseBatch:
    """The scored trajectories of a table, as padded tensors."""

    num_trajectories: int
    """N."""
    kept: np.ndarray
    """`[B]` int64, which of the table's rows these are."""
    prompt_ids: list[np.ndarray]
    """`[P]` int32 each."""
    response_ids: list[np.ndarray]
    """`[R]` int32 each."""
    scores: torch.Tensor
    """`[B]` float32, finite if only scored trajectories were taken."""
    ended: torch.Tensor
    """`[B]` bool, whether the response ended by itself and was not cut off."""
    rollout_logprobs: torch.Tensor
    """`[B, R]` float32, zero outside the mask."""
    response_mask: torch.Tensor
    """`[B, R]` bool."""

    @classmethod
    def from_table(cls, table: pa.Table, scored_only: bool = True) -> "ResponseBatch":
        """Build the batch from a table of `trajectory.SCHEMA`.

        Args:
            table: of trajectories.
            scored_only: leave out rows without a finite score; else these have the score NaN.

        Raises:
            ValueError: the table is not what the exchange promises.
        """
        trajectory.validate(table)
        scores = table.column("score").to_numpy().astype(np.float32)  # null becomes NaN
        kept = np.flatnonzero(np.isfinite(scores)) if scored_only else np.arange(table.num_rows)
        ended = table.column("finish_reason").to_numpy() == "stop"
        ragged = partial(trajectory.ragged, table)
        prompt_ids, response_ids, logprobs = (
            [column[row] for row in kept] for column in map(ragged, ("prompt_ids", "response_ids", "rollout_logprobs"))
        )
        lengths = np.array([len(ids) for ids in response_ids], np.int64)
        mask = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
        padded = np.zeros(mask.shape, np.float32)
        padded[mask] = np.concatenate(logprobs) if logprobs else []
        return cls(
            num_trajectories=table.num_rows,
            kept=kept,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            scores=torch.from_numpy(scores[kept]),
            ended=torch.from_numpy(ended[kept]),
            rollout_logprobs=torch.from_numpy(padded),
            response_mask=torch.from_numpy(mask),
        )

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.kept)

    @cached_property
    def num_response_tokens(self) -> np.ndarray:
        """`[B]` int64."""
        return np.array([len(ids) for ids in self.response_ids], np.int64)

    @cached_property
    def num_inputs(self) -> np.ndarray:
        """`[B]` int64, tokens that a forward pass computes: prompt and response but for its last token."""
        return self.num_tokens - 1

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """`[B]` int64, prompt and response."""
        return self.num_response_tokens + np.array([len(ids) for ids in self.prompt_ids], np.int64)

    def to_lists(self, values: torch.Tensor) -> list[np.ndarray | None]:
        """Cut `[B, R]` values to one `[R]` array for each of the table's N rows; None for those left out."""
        array = values.float().cpu().numpy()
        lists: list[np.ndarray | None] = [None] * self.num_trajectories
        for index, row in enumerate(self.kept):
            lists[row] = array[index, : len(self.response_ids[index])]
        return lists


@dataclass(frozen=True)
class Layout:
    """The layout of a batch in forward passes, and this rank's share of them."""

    microbatch_tokens: int
    """Largest number of tokens, padding included, per pass."""
    row_width: int
    """Tokens that rows are filled up to; 0: one sequence per row."""
    device: torch.device
    ranks: Ranks
    in_lockstep: bool = False
    """Whether all ranks make the same number of passes: those with fewer add empty ones."""
    hidden_size: int = 0
    """Of the policy; 0: prompts that begin alike share no tokens."""

    @classmethod
    def of(
        cls, policy: ActorCritic, reference: ResponseLM, microbatch_tokens: int, ranks: Ranks, in_lockstep: bool
    ) -> Self:
        """Return the layout that both models can take."""
        if not (policy.packs and reference.packs):
            return cls(microbatch_tokens, 0, policy.device, ranks, in_lockstep)
        return cls(microbatch_tokens, _ROW_WIDTH, policy.device, ranks, in_lockstep, policy.decoder.hidden_size)

    def passes(self, batch: ResponseBatch, sequences: np.ndarray) -> Iterator[PackedRows]:
        """Yield this rank's passes over the named sequences, the same in whatever order they are named.

        A rank that has no sequence makes one pass over nothing, so that it reports the same metrics as the others.
        """
        shares = self._deal(batch, np.sort(sequences))
        mine = shares[self.ranks.rank]
        for rows in mine:
            shortest_shared = SHORTEST_SHARED if self.hidden_size else 0
            yield pack(rows, batch.prompt_ids, batch.response_ids, self.device, shortest_shared)
        num_passes = max(map(len, shares)) if self.in_lockstep else 1
        for _ in range(len(mine), num_passes):
            yield PackedRows.empty(self.device)

    def num_passes(self, batch: ResponseBatch) -> int:
        """Return how many passes over all sequences a rank makes at most."""
        return max(map(len, self._deal(batch, np.arange(batch.num_sequences))))

    def _deal(self, batch: ResponseBatch, sequences: np.ndarray) -> list[list[list[Row]]]:
        """Deal sequences, in ascending order, to the ranks; returns each one's micro-batches of rows.

        Every rank sees all sequences, so each knows how many passes the others make.
        """
        units, sizes = [[index] for index in sequences.tolist()], batch.num_inputs[sequences].tolist()
        if self.hidden_size and len(units) > 1:
            fair = sum(sizes) // (2 * self.ranks.size) if self.ranks.size > 1 else self.microbatch_tokens
            units, sizes = join_prompts(
                sequences.tolist(),
                batch.prompt_ids,
                batch.response_ids,
                hidden_size=self.hidden_size,
                narrowest=self.row_width,
                widest=min(self.microbatch_tokens, fair),
            )
        shares = []
        for share in balance(sizes, self.ranks.size):
            micro = make_microbatches([sizes[unit] for unit in share], self.microbatch_tokens, self.row_width)
            shares.append([[[i for place in row for i in units[share[place]]] for row in rows] for rows in micro])
        return shares


Order = Callable[[int], np.ndarray]
"""The order of the scored trajectories in an epoch: a permutation of `[0, B)`."""


def draw_order(num_sequences: int, seed: int, step: int) -> Order:
    """Return the order that the run's seed, the step and the epoch draw."""
    return lambda epoch: np.random.default_rng(derive_seed(seed, "epoch", step, epoch)).permutation(num_sequences)


def split_evenly(order: Sequence[int] | np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an order into contiguous mini-batches of `size`, or a little less so that all are of nearly one size."""
    return np.array_split(np.asarray(order), -(-len(order) // size))


def summarize_table(table: pa.Table, batch: ResponseBatch) -> dict[str, float]:
    """Summarise all trajectories of a step and their scores, as they were given."""
    num_rows = max(table.num_rows, 1)
    num_stopped = table.column("finish_reason").to_pylist().count("stop")
    tokens = trajectory.lengths(table, "response_ids")
    metrics = {
        "score/num_unscored": float(table.num_rows - batch.num_sequences),
        "score/truncated_rate": sum(filter(None, table.column("truncated").to_pylist())) / num_rows,
        "response/tokens_mean": float(tokens.sum()) / num_rows,
        "response/tokens_min": float(tokens.min(initial=tokens.max(initial=0))),
        "response/tokens_max": float(tokens.max(initial=0)),
        "response/eos_rate": num_stopped / num_rows,
        "learner/tokens": float(batch.num_tokens.sum()),
    }
    if batch.num_sequences:
        scores = batch.scores.double()
        metrics |= {
            "score/mean": float(scores.mean()),
            "score/std": float(scores.std()) if len(scores) > 1 else 0.0,
            "score/min": float(scores.min()),
            "score/max": float(scores.max()),
        }
    if "parts" in table.column_names:
        for name, part in zip(table.schema.field("parts").type.names, table.column("parts").flatten(), strict=True):
            known = part.drop_null().to_numpy().astype(np.float64)
            metrics[f"parts/{name}_unscored"] = 1 - len(known) / num_rows
            if len(known):
                spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
                metrics |= {f"parts/{name}_mean": float(known.mean()), f"parts/{name}_std": spread}
    return metrics


def summarize_sources(table: pa.Table, sources: Sequence[str]) -> dict[str, float]:
    """Summarise the scores of each data set of a mixture, as they were given.

    Args:
        table: of `trajectory.SCHEMA`, with the kept column `source`.
        sources: the data sets' names.

    Returns:
        For each that has trajectories in the table: `sources/NAME_unscored`, their share without a score, and
        `sources/NAME_score_mean`, if one has a score.
    """
    metrics: dict[str, float] = {}
    for name in sources:
        scores = table.column("score").filter(pc.equal(pc.struct_field(table.column("row"), SOURCE), name))
        if len(scores):
            metrics[f"sources/{name}_unscored"] = scores.null_count / len(scores)
        if scores.null_count < len(scores):
            metrics[f"sources/{name}_score_mean"] = pc.mean(scores).as_py()
    return metrics


def check_staleness(table: pa.Table, policy_version: int, limit: int) -> dict[str, float]:
    """Check that trajectories are of a policy that the learner had lately.

    Args:
        table: of `trajectory.SCHEMA`.
        policy_version: of the learner, before it learns from them.
        limit: the most updates that may lie between.

    Returns:
        Metrics by name: the mean and the largest staleness, in updates.

    Raises:
        WorkerError: a trajectory is staler, or of a policy that the learner has not had yet; names who sampled it.
    """
    versions = table.column("policy_version").to_numpy()
    staleness = policy_version - versions
    wrong = np.flatnonzero((staleness < 0) | (staleness > limit))
    if len(wrong):
        row = int(wrong[0])
        worker, sample = table.column("worker")[row], table.column("sample_id")[row]
        raise WorkerError(
            f"{worker} sampled the trajectory of sample {sample} with policy version {versions[row]}, but the learner "
            f"is at version {policy_version} and takes those of version {policy_version - limit} or later "
            f"(rollout.max_staleness={limit}); {len(wrong)} of {len(versions)} are like it. The engine does not serve "
            "the weights that it was sent"
        )
    return {"rollout/staleness_mean": float(staleness.mean()), "rollout/staleness_max": float(staleness.max())}
