"""Adam for policy and values: the optimizer, the schedule of its learning rates, and its state in a checkpoint.

The learning rate is a function of the step alone: there is no scheduler with a state to save. The state is written as
safetensors, with no pickle.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import safetensors
import torch

from ppo_ray.checkpoint import LEARNER_FOLDER
from ppo_ray.config import UpdateConfig
from ppo_ray.errors import CheckpointError
from ppo_ray.learner.fsdp import shard_like
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.sharding import Sharding
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.saving import State, TensorFile, find_parts

Schedule = Literal["constant", "linear", "cosine"]

_FILE = Path(LEARNER_FOLDER) / "optimizer.safetensors"


def make_adam(policy: ActorCritic, sharding: Sharding, ppo: UpdateConfig, offload: Offload) -> torch.optim.Adam:
    """Make torch's Adam with its defaults and two parameter groups: the policy's, and the values' if there are any.

    Its state is there at once. torch makes it in the first step, beside all that this step computes; who shares the
    memory would see it as free until then. What lies in host memory between updates goes there tensor by tensor.
    """
    groups = [
        {"params": sharding.optimized_parameters(policy.policy_parameters()), "initial_lr": ppo.learning_rate},
        {
            "params": sharding.optimized_parameters(policy.value_parameters()),
            "initial_lr": ppo.value_learning_rate or ppo.learning_rate,
        },
    ]
    optimizer = torch.optim.Adam(
        [group | {"lr": group["initial_lr"]} for group in groups if group["params"]],
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for moment in ("exp_avg", "exp_avg_sq"):
            zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter][moment] = zeros
            offload.put_away("optimizer", zeros)
    offload.manage("optimizer", lambda: _list_state(optimizer, policy))
    return optimizer


def _list_state(optimizer: torch.optim.Optimizer, policy: ActorCritic) -> Iterator[torch.Tensor]:
    """Yield the tensors that an optimizer alone needs: its moments, and master weights."""
    computed_with = set(policy.parameters())
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter not in computed_with:
            yield parameter
        yield from (tensor for tensor in optimizer.state[parameter].values() if tensor.ndim)


def set_learning_rates(optimizer: torch.optim.Optimizer, ppo: UpdateConfig, step: int, num_steps: int) -> None:
    """Set the learning rate of each group for a step of a run of `num_steps`."""
    factor = learning_rate_factor(
        step, num_steps, ppo.learning_rate_schedule, ppo.warmup_steps, ppo.learning_rate_final_factor
    )
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rate_factor(
    step: int, num_steps: int, schedule: Schedule = "constant", warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """Return the factor of the learning rate in a step.

    It rises linearly over the first `warmup_steps` steps, (step + 1) / warmup_steps, and then, with
    t = (step - warmup_steps) / (num_steps - warmup_steps) and f = `final_factor`, it is
    1 (constant), 1 - (1 - f) t (linear) or f + (1 - f) (1 + cos(pi t)) / 2 (cosine).

    Args:
        step: from 0; a step beyond `num_steps` counts as the last.
        num_steps: of the run.
        schedule: one of the three.
        warmup_steps: 0: no warm-up.
        final_factor: the factor at the end of a linear or cosine schedule.

    Raises:
        ValueError: there is no such schedule.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - final_factor) * t
        case "cosine":
            return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * t)) / 2
    raise ValueError(f"schedule={schedule!r}; it must be constant, linear or cosine")


def optimizer_file(optimizer: torch.optim.Optimizer, policy: ActorCritic, sharding: Sharding) -> TensorFile:
    """Return the file of a checkpoint that holds an optimizer's state, by the policy's names.

    A parameter of which the optimizer keeps nothing yet, as one that was never stepped may be, has none.
    """
    found: State = {}
    for name, parameter in policy.named_parameters():
        for stepped in sharding.optimized_parameters([parameter]):
            for key, tensor in optimizer.state.get(stepped, {}).items():
                found[f"{key}:{name}"] = tensor
    return TensorFile(_FILE, found)


def load_optimizer_state(
    folder: Path, optimizer: torch.optim.Optimizer, policy: ActorCritic, sharding: Sharding, offload: Offload
) -> None:
    """Load the state of `optimizer_file` in a checkpoint into an optimizer; each rank loads its own shards.

    Where the optimizer has a tensor already, that one gets the values. What the file lacks stays as it is, and what
    lies in host memory lies there again.

    Raises:
        CheckpointError: it is not there, or of other parameters.
    """
    named, path = dict(policy.named_parameters()), folder / _FILE
    try:
        for label, tensor in _read_tensors(path):
            key, _, name = label.partition(":")
            parameter = named[name]
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ValueError(f"{label} is {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}")
            for stepped in sharding.optimized_parameters([parameter]):
                placed = shard_like(tensor, stepped) if tensor.ndim else tensor.to(stepped.device, copy=True)
                state = optimizer.state[stepped]
                if key not in state:
                    state[key] = placed
                else:
                    with offload.lend(state[key], changes=True) as own:
                        own.copy_(placed)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read for this model: {error}") from error


def _read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a safetensors file, or of its parts, one at a time."""
    for part in find_parts(path):
        with safetensors.safe_open(part, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)
