"""A step's scored trajectories: as padded tensors and back, in forward passes, and in mini-batches.

Dimensions: N trajectories of the table, B of them with a score, R response tokens (the longest of the batch).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
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
    hidden_size: int = 0
    """Of the policy; 0: prompts that begin alike share no tokens."""
    in_one_row: bool = False
    """Whether sequences that share no tokens lie end to end in one row per pass, as wide as it gets: where no model
    needs a mask to keep them apart."""

    @classmethod
    def of(
        cls, policy: ActorCritic, reference: ResponseLM, microbatch_tokens: int, ranks: Ranks, in_lockstep: bool
    ) -> Self:
        """Return the layout that both models can take."""
        if not (policy.traits.packs and reference.traits.packs):
            return cls(microbatch_tokens, 0, policy.device, ranks, in_lockstep)
        in_one_row = policy.traits.takes_bounds and reference.traits.takes_bounds
        hidden_size = policy.traits.hidden_size
        return cls(microbatch_tokens, _ROW_WIDTH, policy.device, ranks, in_lockstep, hidden_size, in_one_row)

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
        shares: list[list[list[Row]]] = []
        for share in balance(sizes, self.ranks.size):
            apart = [unit for unit in share if self.in_one_row and len(units[unit]) == 1]
            others = [unit for unit in share if unit not in apart]
            shares.append([])
            for group, width in ((others, self.row_width), (apart, self.microbatch_tokens)):
                for rows in make_microbatches([sizes[unit] for unit in group], self.microbatch_tokens, width):
                    shares[-1].append([[i for place in row for i in units[group[place]]] for row in rows])
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
