"""What a learner must keep beside its models to go on as if it had never stopped: safetensors and JSON, no pickle."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch

from ppo_ray.algo.scores import RunningMoments
from ppo_ray.errors import CheckpointError

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]

_FOLDER = "learner"  # of its own: vLLM takes every safetensors file beside a model for a part of it
_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"


@dataclass(frozen=True)
class LearnerState:
    """The learner's figures; its models and its optimizer lie beside them."""

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


def write_optimizer(folder: Path, optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> None:
    """Write an optimizer's state (tensors) by the parameters' names; a parameter that was never stepped has none."""
    tensors = {
        f"{key}:{name}": tensor.detach().cpu().contiguous()
        for name, parameter in parameters
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    path = folder / _FOLDER / _OPTIMIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path)


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> None:
    """Replace an optimizer's state by what `write_optimizer` wrote.

    Raises:
        CheckpointError: it is not there, or of other parameters.
    """
    named, path = dict(parameters), folder / _FOLDER / _OPTIMIZER
    optimizer.state.clear()
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            for label in tensors.keys():  # noqa: SIM118 (not a mapping)
                key, _, name = label.partition(":")
                parameter, tensor = named[name], tensors.get_tensor(label)
                if tensor.ndim and tensor.shape != parameter.shape:
                    raise ValueError(f"{label} is {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}")
                optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read for this model: {error}") from error
