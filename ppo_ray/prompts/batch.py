"""Prompts as they go to the rollout workers."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pyarrow as pa

from ppo_ray import trajectory


@dataclass(frozen=True)
class PromptBatch:
    """Prompts in the order of the stream, a row per response."""

    sample_ids: tuple[int, ...]
    """Index in the stream; held-out prompts count down from -1, so that no seed derived from an id is shared. Of a
    prompt with `group_size` responses, index times `group_size` plus the number of the response."""
    prompt_ids: tuple[tuple[int, ...], ...]
    """`[P]` token ids of each prompt, at least one."""
    max_response_tokens: tuple[int, ...] | None = None
    """Limit of each response; None: drawn by the rollout worker, as the config says."""
    temperature: float | None = None
    """Of sampling; 0 is greedy. None: `rollout.temperature`."""
    columns: pa.Table | None = None
    """What goes with each prompt into its trajectory, as `trajectory.EXTRAS` says; None: nothing."""
    num_skipped: int = 0
    """Prompts left out because the tokenizer makes no ids of the text, or ids that the model does not know."""
    group_size: int = 1
    """Rows of each prompt, which stand together."""

    @property
    def addresses(self) -> list[tuple[int, ...]]:
        """The part of each response's seeds that tells it from the others of its step: its prompt, and its member.

        The first member's is the prompt alone, so it is the response that a prompt with one response has.
        """
        places = (divmod(sample_id, self.group_size) for sample_id in self.sample_ids)
        return [(prompt, member) if member else (prompt,) for prompt, member in places]

    def repeat(self, times: int) -> "PromptBatch":
        """Return each prompt `times` in a row, a group, which the column `group_id` names by the prompt's index."""
        rows = [row for row in range(len(self.sample_ids)) for _ in range(times)]
        groups = pa.array([self.sample_ids[row] for row in rows], trajectory.GROUP_ID)
        columns = pa.table({"group_id": groups})
        if self.columns is not None:
            columns = self.columns.take(rows).append_column("group_id", groups)
        return replace(
            self,
            sample_ids=tuple(sample_id * times + member for sample_id in self.sample_ids for member in range(times)),
            prompt_ids=tuple(self.prompt_ids[row] for row in rows),
            columns=columns,
            group_size=times,
        )

    def split(self, n: int) -> "list[PromptBatch]":
        """Cut into at most n parts, in order, whose sizes differ by one group at most; none is empty."""
        groups = len(self.sample_ids) // self.group_size
        bounds = [groups * part // n * self.group_size for part in range(n + 1)]
        parts = [slice(start, stop) for start, stop in pairwise(bounds) if stop > start]
        limits, columns = self.max_response_tokens, self.columns
        return [
            PromptBatch(
                self.sample_ids[part],
                self.prompt_ids[part],
                None if limits is None else limits[part],
                self.temperature,
                None if columns is None else columns.slice(part.start, part.stop - part.start),
                group_size=self.group_size,
            )
            for part in parts
        ]
