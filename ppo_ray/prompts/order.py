"""The order of a stream's texts: which of them each position has, from (seed, position) alone.

In a mixture, prompt number j of a source with the share w stands at a position from floor((j - 1) / w) to
ceil(j / w) - 1. So after any number n of prompts each source has had its n w of them to less than one.
"""

from collections.abc import Sequence

import numpy as np

from ppo_ray.seeding import derive_seed

HELD_OUT_SEED = 0
"""For every seed of a run: runs are compared on the same prompts."""


class Order:
    """The order in which texts are taken; each source of a mixture has epochs of its own."""

    def __init__(
        self, sources: np.ndarray, quotas: Sequence[int], *, seed: int, num_held_out: int, shuffle: bool = True
    ) -> None:
        """Hold some texts out, the same for every seed: of each source its share.

        Args:
            sources: `[N]`, the number of each text's source.
            quotas: of the prompts that each source has of sum(quotas) in a row.
            seed: of the run.
            num_held_out: texts that no position has. Each source must have more than its share of them.
            shuffle: whether each epoch of a source has an order of its own; else it is that of the data set.
        """
        self._seed, self._shuffle, self._quotas = seed, shuffle, tuple(quotas)
        schedule = make_schedule(quotas)
        self._schedule = schedule
        self._ranks = np.zeros(len(schedule), np.int64)  # how often its source stood before in the period
        for source in range(len(quotas)):
            self._ranks[schedule == source] = np.arange(quotas[source])
        pools = [np.flatnonzero(sources == source) for source in range(len(quotas))]
        orders = [pool[_permutation(len(pool), HELD_OUT_SEED, "held_out", source)] for source, pool in enumerate(pools)]
        places = [self._locate(position) for position in range(num_held_out)]
        self.held_out = np.array([orders[source][place] for source, place in places], np.int64)
        """`[num_held_out]` int64, which texts are held out."""
        counts = count_held_out(quotas, num_held_out)
        self._pools = [np.sort(order[count:]) for order, count in zip(orders, counts, strict=True)]
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def index(self, position: int) -> int:
        """Return which text stands at a position of the stream."""
        source, place = self._locate(position)
        pool = self._pools[source]
        epoch, offset = divmod(place, len(pool))
        if not self._shuffle:
            return int(pool[offset])
        if self._epochs.get(source, (-1,))[0] != epoch:
            self._epochs[source] = epoch, _permutation(len(pool), self._seed, "prompt_order", source, epoch)
        return int(pool[self._epochs[source][1][offset]])

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and how many of its prompts stand before."""
        period, offset = divmod(position, len(self._schedule))
        source = int(self._schedule[offset])
        return source, period * self._quotas[source] + int(self._ranks[offset])


def make_schedule(quotas: Sequence[int]) -> np.ndarray:
    """Return the sources of a period, `[sum(quotas)]` int64: of those that may come the one that must come first.

    Number j of a source with q of T may come when (j - 1) T < q n after n prompts with it, and must come by
    ceil(j T / q). That there is such a schedule, and that the earliest deadline finds it: Liu & Layland's argument for
    unit tasks; Tijdeman 1980, "The chairman assignment problem".
    """
    total = sum(quotas)
    counts = [0] * len(quotas)
    schedule = np.zeros(total, np.int64)
    for position in range(total):
        ready = [source for source, quota in enumerate(quotas) if counts[source] * total < quota * (position + 1)]
        source = min(ready, key=lambda source: -(-(counts[source] + 1) * total // quotas[source]))
        schedule[position] = source
        counts[source] += 1
    return schedule


def count_held_out(quotas: Sequence[int], num_held_out: int) -> list[int]:
    """Return how many texts of each source are among the first of a stream."""
    periods, rest = divmod(num_held_out, sum(quotas))
    began = np.bincount(make_schedule(quotas)[:rest], minlength=len(quotas))
    return [periods * quota + int(count) for quota, count in zip(quotas, began, strict=True)]


def _permutation(size: int, seed: int, purpose: str, source: int, *address: int) -> np.ndarray:
    """Draw an order; the first source's is that of a stream without a mixture."""
    return np.random.default_rng(derive_seed(seed, purpose, *address, *([source] if source else []))).permutation(size)
