"""A trial of compiled layers before the first step: the passes of an update, compiled and as they are."""

from functools import partial

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ppo_ray.errors import InputError, PeersLost, first_line
from ppo_ray.learner.ranks import detect_lost_peers
from ppo_ray.learner.sharding import Sharding
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.fusion import measure_compilation
from ppo_ray.models.packing import PackedRows, pack
from ppo_ray.models.response_lm import ResponseLM

_SMALL = 1e-3  # a tensor smaller than this part of all is held against that part: nothing but rounding may be in it


def try_compilation(policy: ActorCritic, reference: ResponseLM, sharding: Sharding, dtype: torch.dtype) -> None:
    """Compile what an update needs, and hold its results against those of the layers as they are; all ranks call it.

    Two sequences go through all passes of an update: end to end in one row, with tokens that they share, and in two
    rows; without a gradient, and forwards and backwards. So most is compiled at the start, where a wait is expected,
    and nothing that compiling breaks is learned from.

    Args:
        policy: as it will be trained, its layers to be compiled at their first pass.
        reference: frozen.
        sharding: of the policy.
        dtype: that both compute in; half of its digits must agree.

    Raises:
        InputError: the layers cannot be compiled here, or compute something else when they are.
        PeersLost: another rank is gone.
    """
    name, vocabulary = policy.causal_lm.config.name_or_path, policy.causal_lm.get_input_embeddings().num_embeddings
    tokens = np.random.default_rng(0).integers(0, vocabulary, 24)
    close = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    prompts, responses = [tokens[:5], tokens[[0, 1, 2, 5]]], [tokens[6:11], tokens[11:]]
    lay_out = partial(pack, prompt_ids=prompts, response_ids=responses, device=policy.device)
    if policy.traits.packs and reference.traits.packs:
        passes = [lay_out([[0, 1]]), lay_out([[0, 1]], shortest_shared=1), lay_out([[0], [1]])]
    else:
        passes = [lay_out([[0]]), lay_out([[0], [1]])]
    for rows in passes:
        with torch.compiler.set_stance("force_eager"):
            wanted = _compute(policy, reference, sharding, rows)
        try:
            found = _compute(policy, reference, sharding, rows)
        except (torch.OutOfMemoryError, PeersLost):
            raise
        except Exception as error:  # torch's compiler, and the compilers that it calls, have errors of their own
            reason: Exception = getattr(error, "inner_exception", error)
            raise InputError(
                f"learner.compile: the layers of the model {name!r} cannot be compiled on this machine "
                f"({type(reason).__name__}: {first_line(reason)}). torch needs a C++ compiler, such as g++, and Triton "
                "for a GPU. Install what is missing, or leave out learner.compile"
            ) from error
        if not measure_compilation():
            raise InputError(
                f"learner.compile: torch has compiled nothing of the model {name!r}. Take TORCH_COMPILE_DISABLE and "
                "TORCHDYNAMO_DISABLE out of the environment, or leave out learner.compile"
            )
        for what, tensors in wanted.items():
            if not (off := _measure_error(found[what], tensors)) <= close:
                raise InputError(
                    f"learner.compile: the {what} of the model {name!r} differ by {off:.1e} of their size when its "
                    f"layers are compiled, more than {close:.0e}: leave out learner.compile"
                )


def _compute(
    policy: ActorCritic, reference: ResponseLM, sharding: Sharding, rows: PackedRows
) -> dict[str, list[torch.Tensor]]:
    """Make all passes of an update over some rows; returns what they compute, and leaves no gradient."""
    with detect_lost_peers(sharding.ranks.rank):
        with torch.no_grad():
            frozen, old = reference(rows), policy(rows)
        output = policy(rows)
        loss = output.logprobs.sum() + output.entropies.sum()
        if output.values is not None:
            loss = loss + output.values.sum()
        sharding.before_backward(completes=True)
        loss.backward()
    found = {"log-probabilities": [frozen.logprobs, old.logprobs, output.logprobs.detach()], "gradients": []}
    if output.values is not None and old.values is not None:
        found["values"] = [old.values, output.values.detach()]
    for parameter in sharding.optimized_parameters(policy.parameters()):
        grad, parameter.grad = parameter.grad, None
        if grad is not None:
            found["gradients"].append(grad.to_local() if isinstance(grad, DTensor) else grad)
    sharding.release_gathered(backward_follows=False)
    return found


def _measure_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference of a tensor to what it should be, by its norm; NaN if there is one."""
    sizes, errors = (
        torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
        for tensors in (wanted, [one - other for one, other in zip(found, wanted, strict=True)])
    )
    size = torch.maximum(sizes, _SMALL * torch.linalg.vector_norm(sizes)).clamp(min=torch.finfo(torch.float32).tiny)
    return float((errors / size).max())
