"""The processes that share an update: each takes its part of the work, and sums make them one again."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; by itself where there is one only.

    With more than one, torch's default process group must be up, and all ranks make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def max(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its maximum over all ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Iterable[torch.Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        if self.size == 1:
            return
        for work in [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]:
            work.wait()
