"""What is made of scores before they become rewards: scaling by running moments, clipping, a penalty for no ending."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of all scores seen so far (Chan et al. 1979's parallel update; TRL 0.11's RunningMoments)."""

    count: int = 0
    """How many scores."""
    mean: float = 0.0
    """Their mean."""
    var: float = 0.0
    """Their population variance."""

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two scores."""
        return math.sqrt(self.var * self.count / (self.count - 1)) if self.count > 1 else 0.0

    def updated(self, scores: torch.Tensor) -> "RunningMoments":
        """Return the moments with a batch of `[B]` finite scores added."""
        if scores.ndim != 1 or not scores.isfinite().all():
            raise ValueError(f"scores are {tuple(scores.shape)}, not [B], or not all finite")
        if not len(scores):
            return self
        batch = scores.double()
        delta, count = float(batch.mean()) - self.mean, self.count + len(scores)
        squares = self.var * self.count + float(batch.var(correction=0)) * len(scores)
        squares += delta**2 * self.count * len(scores) / count
        return RunningMoments(count, self.mean + delta * len(scores) / count, squares / count)


def scale_scores(scores: torch.Tensor, moments: RunningMoments, subtract_mean: bool = False) -> torch.Tensor:
    """Divide `[B]` scores by the running standard deviation: s / (std + eps), or (s - mean) / (std + eps).

    eps is the dtype's machine epsilon. TRL 0.11's `use_score_scaling` and `use_score_norm` (its 0.11.3 crashes in
    both). Where all scores so far are equal their scale is unknown, and they are not divided; TRL would divide by eps.
    """
    centred = scores - moments.mean if subtract_mean else scores
    return centred / (moments.std + torch.finfo(scores.dtype).eps) if moments.std else centred


def clip_scores(scores: torch.Tensor, limit: float) -> torch.Tensor:
    """Hold `[B]` scores within -limit and limit (TRL 0.11's `score_clip`)."""
    return scores.clamp(-limit, limit)


def penalise_missing_eos(scores: torch.Tensor, ended: torch.Tensor, penalty: float) -> torch.Tensor:
    """Subtract a penalty from the scores of responses that were cut off: s - penalty * [not ended].

    A fixed cost teaches the policy to come to an end (Stiennon et al. 2020's "EOS trick" in the form of TRL 0.12's
    `missing_eos_penalty`).

    Args:
        scores: `[B]` floating point.
        ended: `[B]` bool, whether the response ended by itself.
        penalty: in the score's unit, after scaling and clipping.
    """
    if ended.shape != scores.shape or ended.dtype != torch.bool:
        raise ValueError(f"ended is {ended.dtype} {tuple(ended.shape)}, not torch.bool {tuple(scores.shape)}")
    return torch.where(ended, scores, scores - penalty)
