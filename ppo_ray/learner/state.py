"""The learner's saved state besides its models: optimizer, KL controller, moments; safetensors and JSON, no pickle."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch

from ppo_ray.algo.rewards import RunningMoments
from ppo_ray.errors import CheckpointError
from ppo_ray.learner.sharding import Sharding, gather_full, shard_like
from ppo_ray.models.actor_critic import ActorCritic, State

_FOLDER = "learner"  # of its own: vLLM takes every safetensors file beside a model for a part of it
_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"


@dataclass(frozen=True)
class LearnerState:
    """The scalars of a learner's state; models and optimizer lie in files of their own."""

    policy_version: int
    kl_coef: float
    """Of the next update."""
    moments: RunningMoments
    """Of all scores so far."""
    weights_checksum: str
    """Of the policy's weights; see `weights_checksum`."""
    reference_checksum: str
    """Of the reference's weights: another reference would be another run."""

    def write(self, folder: Path) -> None:
        """Write into a checkpoint's folder; floats are written so that the very same are read."""
        path = folder / _FOLDER / _STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read out of a checkpoint's folder.

        Raises:
            CheckpointError: it is not there, or not one of ours.
        """
        try:
            fields = json.loads((folder / _FOLDER / _STATE).read_text(encoding="utf-8"))
            return cls(**fields | {"moments": RunningMoments(**fields["moments"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / _FOLDER / _STATE} cannot be read: {error}") from error


@dataclass(frozen=True)
class LearnerSnapshot:
    """A learner's whole state, gathered to the first rank, which writes it without the others."""

    policy: ActorCritic
    models: State
    """Of the policy and its values, by the policy's names."""
    optimizer: State
    state: LearnerState
    tokenizer: Any

    def write(self, folder: Path) -> None:
        """Write policy and tokenizer for `from_pretrained`, and the rest into folders beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder, self.models)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        self.state.write(folder)
        safetensors.torch.save_file(self.optimizer, folder / _FOLDER / _OPTIMIZER)


def gather_optimizer_state(optimizer: torch.optim.Optimizer, policy: ActorCritic, sharding: Sharding) -> State:
    """Gather an optimizer's full state, by the policy's names, to the first rank's host memory; all ranks call this.

    A parameter that was never stepped has none.
    """
    found: State = {}
    for name, parameter in policy.named_parameters():
        for stepped in sharding.optimized_parameters([parameter]):
            for key, tensor in optimizer.state.get(stepped, {}).items():
                gathered = gather_full(tensor)
                if sharding.ranks.leads:
                    found[f"{key}:{name}"] = gathered.cpu().contiguous()
    return found


def load_optimizer_state(
    folder: Path, optimizer: torch.optim.Optimizer, policy: ActorCritic, sharding: Sharding
) -> None:
    """Replace an optimizer's state by the one that `LearnerSnapshot` wrote; each rank loads its own shards.

    Raises:
        CheckpointError: it is not there, or of other parameters.
    """
    named, path = dict(policy.named_parameters()), folder / _FOLDER / _OPTIMIZER
    optimizer.state.clear()
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            for label in tensors.keys():  # noqa: SIM118 (not a mapping)
                key, _, name = label.partition(":")
                parameter, tensor = named[name], tensors.get_tensor(label)
                if tensor.ndim and tensor.shape != parameter.shape:
                    raise ValueError(f"{label} is {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}")
                for stepped in sharding.optimized_parameters([parameter]):
                    placed = shard_like(tensor, stepped) if tensor.ndim else tensor.to(stepped.device, copy=True)
                    optimizer.state[stepped][key] = placed
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read for this model: {error}") from error
