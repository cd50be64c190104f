"""A step's scored trajectories: as padded tensors and back, in forward passes, in mini-batches, and in metrics.

Dimensions: N trajectories of the table, B of them with a score, R response tokens (the longest of the batch).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.errors import WorkerError
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models.packing import PackedRows, Row, balance, make_microbatches, pack
from ppo_ray.seeding import derive_seed


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
    groups: np.ndarray
    """`[B]` int64, equal for the responses to one prompt; all different where the table names no groups."""

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
        has_groups = "group_id" in table.column_names
        groups = table.column("group_id").to_numpy() if has_groups else np.arange(table.num_rows)
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
            groups=groups[kept],
        )

    def take(self, rows: np.ndarray) -> "ResponseBatch":
        """Return some of the sequences; `rows` are their numbers, `[b]` int64."""
        mask = self.response_mask[rows]
        columns = slice(int(mask.sum(1).max()) if len(rows) else 0)
        return replace(
            self,
            kept=self.kept[rows],
            prompt_ids=[self.prompt_ids[row] for row in rows],
            response_ids=[self.response_ids[row] for row in rows],
            scores=self.scores[rows],
            ended=self.ended[rows],
            rollout_logprobs=self.rollout_logprobs[rows, columns],
            response_mask=mask[:, columns],
            groups=self.groups[rows],
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

    def to_lists(self, values: torch.Tensor | None) -> list[np.ndarray | None]:
        """Cut `[B, R]` values to one `[R]` array for each of the table's N rows; None for others."""
        lists: list[np.ndarray | None] = [None] * self.num_trajectories
        if values is None:
            return lists
        array = values.float().cpu().numpy()
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

    def passes(self, batch: ResponseBatch, sequences: np.ndarray) -> Iterator[PackedRows]:
        """Yield this rank's passes over the named sequences, the same in whatever order they are named.

        A rank that has no sequence makes one pass over nothing, so that it reports the same metrics as the others.
        """
        sequences = np.sort(sequences)
        shares = self._shares(batch.num_inputs[sequences])
        mine = shares[self.ranks.rank]
        for rows in mine:
            named = [[int(sequences[index]) for index in row] for row in rows]
            yield pack(named, batch.prompt_ids, batch.response_ids, self.device)
        num_passes = max(map(len, shares)) if self.in_lockstep else 1
        for _ in range(len(mine), num_passes):
            yield PackedRows.empty(self.device)

    def num_passes(self, batch: ResponseBatch) -> int:
        """Return how many passes over all sequences a rank makes at most."""
        return max(map(len, self._shares(batch.num_inputs)))

    def _shares(self, lengths: np.ndarray) -> list[list[list[Row]]]:
        """Deal sequences of these lengths to the ranks; returns each one's micro-batches of rows of indices.

        Every rank sees all lengths, so each knows how many passes the others make.
        """
        shares = []
        for share in balance(lengths.tolist(), self.ranks.size):
            micro = make_microbatches(lengths[share].tolist(), self.microbatch_tokens, self.row_width)
            shares.append([[[share[index] for index in row] for row in rows] for rows in micro])
        return shares


Order = Callable[[int], np.ndarray]
"""The order of the scored trajectories in an epoch: a permutation of `[0, B)`."""


def draw_order(num_sequences: int, seed: int, step: int) -> Order:
    """Return the order that the run's seed, the step and the epoch draw."""
    return lambda epoch: np.random.default_rng(derive_seed(seed, "epoch", step, epoch)).permutation(num_sequences)


def split_groups(order: np.ndarray, groups: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an order into mini-batches of whole groups: of `size` rows, or fewer so that all have nearly as many groups.

    A group stands where the order has the first of it. Where every row is a group of its own, the order is cut as it
    is.

    Args:
        order: `[B]` int64, a permutation of the rows.
        groups: `[B]` int64, of the rows: those of a group stay together.
        size: most rows of a mini-batch, if groups are of one size; at least 1.
    """
    _, first, place = np.unique(groups[order], return_index=True, return_inverse=True)
    begins = first[place]  # where in the order each row's group begins
    stable = np.argsort(begins, kind="stable")
    starts = np.flatnonzero(np.diff(begins[stable], prepend=-1))
    parts = np.array_split(starts, min(-(-len(order) // size), len(starts)))
    return np.split(order[stable], [part[0] for part in parts[1:]])


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
    if "group_id" in table.column_names:
        num_groups = len(np.unique(batch.groups))
        num_flat = len(np.unique(batch.groups[trajectory.find_flat(table)[batch.kept]]))
        metrics["groups/flat_fraction"] = num_flat / max(num_groups, 1)
    if "parts" in table.column_names:
        for name, part in zip(table.schema.field("parts").type.names, table.column("parts").flatten(), strict=True):
            known = part.drop_null().to_numpy().astype(np.float64)
            metrics[f"parts/{name}_unscored"] = 1 - len(known) / num_rows
            if len(known):
                spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
                metrics |= {f"parts/{name}_mean": float(known.mean()), f"parts/{name}_std": spread}
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
