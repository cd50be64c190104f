"""The learner's state: its models, loaded as the config says, and all that a checkpoint holds of it.

Scalars are written as JSON and tensors as safetensors, with no pickle.
"""

import copy
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel

from ppo_ray import trajectory
from ppo_ray.algo.rewards import RunningMoments
from ppo_ray.checkpoint import AHEAD, LEARNER_FOLDER, read_record
from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig
from ppo_ray.errors import CheckpointError, InputError, first_line
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.sharding import FullySharded, Replicated, Sharding
from ppo_ray.machine import max_memory_of_file
from ppo_ray.models.actor_critic import (
    CRITIC_FOLDER,
    ActorCritic,
    CausalLMWithCritic,
    CausalLMWithValueHead,
    UnadaptedPolicy,
)
from ppo_ray.models.decoder import recompute_layers
from ppo_ray.models.loading import cast, load_causal_lm, load_pretrained, load_tokenizer
from ppo_ray.models.quantization import set_dtype
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.support import find_decoder
from ppo_ray.seeding import derive_seed

_FILE = "state.json"


@dataclass(frozen=True)
class LearnerState:
    """The scalars of a learner's state; models and optimizer lie in files of their own."""

    policy_version: int
    kl_coef: float
    """Weight of the KL penalty in the next update."""
    moments: RunningMoments
    """Running moments of all scores so far."""
    weights_checksum: str
    """Checksum of the policy's weights; see `StateChecksums`."""
    reference_checksum: str
    """Checksum of the reference's weights: another reference would be another run."""
    by_tensor: bool = False
    """Whether the checksums are made of those of each tensor; older checkpoints have one over all bytes in a row."""

    def write(self, folder: Path) -> None:
        """Write into a checkpoint's folder; floats are written so that the very same are read."""
        path = folder / LEARNER_FOLDER / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read out of a checkpoint's folder.

        Raises:
            CheckpointError: it is not there, or not one of ours.
        """
        return read_record(cls, folder / LEARNER_FOLDER / _FILE)


def make_plain_files(policy: ActorCritic, tokenizer: Any, dtype: torch.dtype) -> dict[str, bytes]:
    """Return what a checkpoint holds of models and tokenizer beside the tensors, which are of a type; by path."""
    with tempfile.TemporaryDirectory(prefix="ppo_ray-") as folder:
        policy.save_configs(Path(folder), dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True)
class LearnerModels:
    """The models of a learner, on this rank."""

    policy: ActorCritic
    """The policy, with its value head or critic."""
    reference: ResponseLM
    """The frozen reference."""
    sharding: Sharding
    """Layout of the policy on the ranks."""
    tokenizer: Any
    """The policy's own; lies in its checkpoints."""


def load_models(
    model: ModelConfig,
    learner: LearnerConfig,
    temperature: float,
    value_head_seed: int,
    device: torch.device,
    ranks: Ranks,
    checkpoint: Path | None = None,
    has_values: bool = True,
) -> LearnerModels:
    """Load policy, values and reference onto a device; under `fsdp2` this rank's share of them.

    Args:
        model: which models.
        learner: how they lie on the ranks.
        temperature: at which responses are sampled.
        value_head_seed: of the initial weights of the value head.
        device: where they go. `FullySharded` moves them there layer by layer: the device never holds a full model.
        ranks: the processes that share the update.
        checkpoint: policy and values are loaded from it instead, or their adapters; the reference, and the base of
            adapters, stay those of `model`.
        has_values: whether there is a value head or critic.

    Raises:
        InputError: a model cannot be loaded, is not supported, or could not be saved.
    """
    shared = learner.sharding == "fsdp2" and ranks.size > 1
    loaded_on = torch.device("cpu") if shared else device
    here: dict[str, Any] = {"path": str(checkpoint), "revision": None, "critic_path": None, "critic_revision": None}
    if model.lora is not None:
        here = {"lora": LoraConfig(path=str(checkpoint))}
    trained = model.model_copy(update=here) if checkpoint else model
    policy = load_actor_critic(trained, temperature, value_head_seed, loaded_on, has_values)
    own = model.lora is not None and model.reference_path is None
    reference = UnadaptedPolicy(policy) if own else load_reference(model, temperature, loaded_on)
    tokenizer = load_tokenizer(model.path, model.trust)
    _try_save(policy, tokenizer)
    if learner.gradient_checkpointing:
        recompute_layers(policy)
    dtype = None if policy.adapted else _compute_dtype(model)
    if shared:
        _copy_shared_weights(policy)
        return LearnerModels(policy, reference, FullySharded(policy, reference, ranks, dtype, device), tokenizer)
    return LearnerModels(policy, reference, Replicated(policy, ranks, dtype), tokenizer)


def _try_save(policy: ActorCritic, tokenizer: Any) -> None:
    """Make all that a checkpoint holds of models and tokenizer, but their tensors, and throw it away.

    What transformers refuses to write is thus known before the first step, not when the first checkpoint is due.

    Raises:
        InputError: something cannot be written.
    """
    try:
        make_plain_files(policy, tokenizer, next(policy.parameters()).dtype)
    except Exception as error:  # whatever transformers, or a model's or tokenizer's own code, raises
        name = policy.causal_lm.config.name_or_path
        raise InputError(
            f"no checkpoint could be written of the model {name!r}: {type(error).__name__}: {first_line(error)}. "
            "Mend what the message names in the model's folder"
        ) from error


def load_actor_critic(
    model: ModelConfig, temperature: float, value_head_seed: int, device: torch.device, has_values: bool = True
) -> ActorCritic:
    """Load the policy with its value head or critic, or without; a value head that lies with its decoder is loaded too.

    If the policy computes in bfloat16, its parameters are float32: the masters are made of them. With adapters these
    are float32, and the frozen weights are of the type that the policy computes in, or codes that stand for them.

    Raises:
        InputError: a model cannot be loaded or is not supported.
    """
    path, trust = model.path, model.trust
    how: Any = {"dtype": _master_dtype(model), "device": device, "quantization": model.quantization}
    causal_lm = load_causal_lm(path, trust=trust, **how)
    actor_critic: ActorCritic
    if not has_values:
        actor_critic = ActorCritic(causal_lm, temperature=temperature)
    elif model.critic == "separate":
        trained, (path, trust) = Path(model.path) / CRITIC_FOLDER, model.critic_source
        if model.critic_path is None and trained.is_dir():
            path = str(trained)
        if model.lora is not None and (path, trust) == (model.path, model.trust):
            critic = _share_weights(find_decoder(causal_lm))
        else:
            critic = load_pretrained(AutoModel, path, trust=trust, **how)
        actor_critic = CausalLMWithCritic(causal_lm, critic, temperature=temperature, value_head_seed=value_head_seed)
    else:
        actor_critic = CausalLMWithValueHead(causal_lm, temperature=temperature, value_head_seed=value_head_seed)
    if actor_critic.value_head is not None:
        if model.value_head_init == "zeros":
            for parameter in actor_critic.value_head.parameters():
                torch.nn.init.zeros_(parameter)
        actor_critic.load_value_head(path, **trust.place)
    if model.lora is not None:
        _adapt(actor_critic, model, model.lora, derive_seed(value_head_seed, "lora"))
    return actor_critic


def _share_weights(decoder: Any) -> Any:
    """Return a second decoder on the very same parameters or codes, which are frozen: it gets adapters of its own."""
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    return copy.deepcopy(decoder, shared)


def _copy_shared_weights(policy: ActorCritic) -> None:
    """Give a critic that shares the policy's frozen weights copies of them: fsdp2 shards a parameter in one place."""
    if not isinstance(policy, CausalLMWithCritic):
        return
    shared = set(policy.causal_lm.parameters())
    for module in policy.critic.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in shared:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _adapt(actor_critic: ActorCritic, model: ModelConfig, lora: LoraConfig, seed: int) -> None:
    """Put adapters into policy and critic, new ones or those at `lora.path` with the value head that lies there."""
    from ppo_ray.models.adapter_files import CONFIG_FILE, load_adapters, make_adapter_config, make_critic_config
    from ppo_ray.models.lora import is_adapter

    config, values = make_adapter_config(lora, model.path), Path(lora.path or "")
    actor_critic.add_adapters(config, seed)
    if lora.path is not None:
        load_adapters(actor_critic.causal_lm, lora.path)
    if isinstance(actor_critic, CausalLMWithCritic):
        values /= CRITIC_FOLDER
        own = make_critic_config(config, lora, values, model.critic_source[0])
        actor_critic.add_critic_adapters(own, derive_seed(seed, "critic"))
        if lora.path is not None and (values / CONFIG_FILE).is_file():
            load_adapters(actor_critic.critic, str(values))
    head = actor_critic.value_head
    if head is not None and lora.path is not None and values.is_dir():
        actor_critic.load_value_head(values)
    heads = set() if head is None else set(head.parameters())
    for name, parameter in actor_critic.named_parameters():
        if not is_adapter(name) and parameter not in heads:
            cast(parameter, _compute_dtype(model))
    set_dtype(actor_critic, _compute_dtype(model))


def load_reference(model: ModelConfig, temperature: float, device: torch.device) -> ResponseLM:
    """Load the frozen reference, in the type it computes in: `model.reference_path`, or the policy as it starts.

    Raises:
        InputError: it cannot be loaded or is not supported.
    """
    path, trust = model.reference
    causal_lm = load_causal_lm(path, dtype=_master_dtype(model), device=device, trust=trust)
    reference = ResponseLM(causal_lm, temperature=temperature)  # checked in float32, where rounding hides nothing
    reference.requires_grad_(False)
    for parameter in reference.parameters():
        cast(parameter, _compute_dtype(model))
    return reference


def _compute_dtype(model: ModelConfig) -> torch.dtype:
    """Return the type of the parameters that forward passes use."""
    return getattr(torch, model.dtype)


def _master_dtype(model: ModelConfig) -> str:
    """Return the type of the parameters that the optimizer steps: float32 under bfloat16, which would lose 1e-5."""
    return "float32" if model.dtype == "bfloat16" else model.dtype


def read_ahead(checkpoint: Path) -> pa.Table:
    """Read the next step's trajectories out of a checkpoint.

    Raises:
        CheckpointError: they are not there, or damaged, or something else, or unpack to far more than their size.
    """
    path = checkpoint / AHEAD
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            unpacked, size = sum(group.total_byte_size for group in groups), path.stat().st_size
            if unpacked > max_memory_of_file(size):
                raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
            table = file.read()
        table.validate(full=True)
        trajectory.validate(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return table
