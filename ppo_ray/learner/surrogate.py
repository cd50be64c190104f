"""The policy's loss that `ppo.policy_loss` names: one of `algo.surrogates`, or a function of the user's own.

Dimensions: B sequences of a micro-batch, R response tokens.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ppo_ray.algo.surrogates import PolicyLoss, cispo_surrogate, clipped_surrogate, custom_surrogate, gspo_surrogate
from ppo_ray.config import UpdateConfig
from ppo_ray.errors import InputError, WorkerError
from ppo_ray.reward.function import load_function

_ARGUMENTS = ("logprobs", "old_logprobs", "advantages", "mask")

Surrogate = Callable[..., PolicyLoss]
"""Takes `logprobs, old_logprobs, advantages, mask, weights` and `importance` as `clipped_surrogate` does."""


def make_surrogate(ppo: UpdateConfig) -> Surrogate:
    """Return the policy's loss with its options.

    Raises:
        InputError: the function cannot be imported, or has a parameter that nothing is known for.
    """
    high = ppo.clip_range if ppo.clip_range_high is None else ppo.clip_range_high
    match ppo.policy_loss:
        case "clip":
            return partial(
                clipped_surrogate,
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
                dual_clip=ppo.dual_clip,
                log_ratio_clamp=ppo.log_ratio_clamp,
            )
        case "gspo":
            return partial(
                _without_importance,
                partial(
                    gspo_surrogate,
                    clip_range=ppo.clip_range,
                    clip_range_high=ppo.clip_range_high,
                    log_ratio_clamp=ppo.log_ratio_clamp,
                ),
            )
        case "cispo":
            return partial(cispo_surrogate, clip_range_high=high, log_ratio_clamp=ppo.log_ratio_clamp)
    return OwnLoss(ppo.policy_loss)


def _without_importance(surrogate: Surrogate, *tensors: torch.Tensor, importance: torch.Tensor | None) -> PolicyLoss:
    if importance is not None:
        raise ValueError("ppo.importance_cap has weights of single tokens, and ppo.policy_loss=gspo none")
    return surrogate(*tensors)


class OwnLoss:
    """The user's own function as the policy's loss, which returns a loss per token, `[B, R]`.

    It is called with those of `logprobs`, `old_logprobs`, `advantages` and `mask` that it has parameters for, by name.
    All are `[B, R]`, zero (False) outside the mask; `logprobs` alone has a gradient. What it returns outside the mask
    does not count. A row of the result may depend on that row alone, or the split into micro-batches would change the
    update.
    """

    def __init__(self, name: str) -> None:
        """Import the function.

        Args:
            name: `package.module:function`, importable where the learner runs.

        Raises:
            InputError: it cannot be imported, or has a parameter that nothing is known for.
        """
        self._option = f"ppo.policy_loss={name!r}"
        self._function = load_function(name, "ppo", "policy_loss")
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._option}: its parameters cannot be read: {error}") from error
        takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters)
        named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        bare = [item for item in parameters if item.kind is item.POSITIONAL_ONLY and item.default is item.empty]
        unknown = [item.name for item in named if item.name not in _ARGUMENTS and item.default is item.empty]
        self._arguments = [name for name in _ARGUMENTS if takes_all or name in [item.name for item in named]]
        if unknown or bare or "logprobs" not in self._arguments:
            wrong = ", ".join([*unknown, *(item.name for item in bare)]) or "without logprobs nothing is learnt"
            raise InputError(
                f"{self._option}: nothing is known for its parameters ({wrong}); there are {', '.join(_ARGUMENTS)}"
            )

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor,
        importance: torch.Tensor | None = None,
    ) -> PolicyLoss:
        """Compute the loss of a micro-batch.

        Raises:
            WorkerError: the function raised, or returned something else than a finite loss per token with a gradient.
        """
        tensors = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}
        given: dict[str, Any] = {name: torch.where(mask, tensor, 0) for name, tensor in tensors.items()}
        given["mask"] = mask
        losses = logprobs
        if len(mask):  # a pass over nothing keeps ranks in step, and is none of the function's business
            try:
                losses = self._function(**{name: given[name] for name in self._arguments})
            except Exception as error:  # whatever the user's own function raises
                raise WorkerError(f"{self._option}: raised {type(error).__name__}: {error}") from error
            self._check(losses, given["logprobs"], mask)
        return custom_surrogate(losses, logprobs, old_logprobs, mask, weights, importance)

    def _check(self, losses: Any, logprobs: torch.Tensor, mask: torch.Tensor) -> None:
        wanted = f"a loss per token is {logprobs.dtype} {tuple(mask.shape)}, as logprobs"
        if not isinstance(losses, torch.Tensor):
            raise WorkerError(f"{self._option}: returned a {type(losses).__name__}; {wanted}")
        if losses.shape != mask.shape or losses.dtype != logprobs.dtype:
            raise WorkerError(f"{self._option}: returned {losses.dtype} {tuple(losses.shape)}; {wanted}")
        if logprobs.requires_grad and not losses.requires_grad:
            raise WorkerError(f"{self._option}: returned a loss that does not depend on logprobs; nothing is learnt")
        wrong = mask & ~losses.isfinite()
        if wrong.any() and logprobs.isfinite().all():
            row, column = wrong.nonzero()[0].tolist()
            figures = f"logprob {logprobs[row, column].item():.6g}, loss {losses[row, column].item()}"
            raise WorkerError(
                f"{self._option}: {int(wrong.sum())} of {int(mask.sum())} tokens' losses are not finite; the first is "
                f"token {column + 1} of its response ({figures})"
            )
