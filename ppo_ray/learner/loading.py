"""Loading of the learner's models, as the config says: policy, values and reference, and their place on the ranks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig, Trust
from ppo_ray.errors import InputError, first_line
from ppo_ray.learner.compilation import try_compilation
from ppo_ray.learner.fsdp import make_mesh
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.reader import FirstReader, Reader
from ppo_ray.learner.sharding import FullySharded, Replicated, Sharding
from ppo_ray.learner.state import make_plain_files
from ppo_ray.models.actor_critic import (
    CRITIC_FOLDER,
    ActorCritic,
    CausalLMWithCritic,
    CausalLMWithValueHead,
    UnadaptedPolicy,
)
from ppo_ray.models.decoder import Decoder, Traits, recompute_layers
from ppo_ray.models.fusion import compile_layers, fuse_norms
from ppo_ray.models.loading import cast, load_tokenizer
from ppo_ray.models.quantization import set_dtype
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.support import find_decoder
from ppo_ray.seeding import derive_seed

_CPU = torch.device("cpu")


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
    offload: Offload
    """What of it lies in host memory between the phases that need it."""


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
        device: where they go.
        ranks: the processes that share the update.
        checkpoint: policy and values are loaded from it instead, or their adapters; the reference, and the base of
            adapters, stay those of `model`.
        has_values: whether there is a value head or critic.

    Raises:
        InputError: a model cannot be loaded, is not supported, or could not be saved or compiled.
    """
    shared = learner.sharding == "fsdp2" and ranks.size > 1
    mesh = make_mesh(ranks, device, learner.shard_size) if shared else None
    offload, dtype = Offload(learner.offload), None if model.lora is not None else _compute_dtype(model)
    has_masters = "optimizer" in offload and dtype == torch.bfloat16
    reader = FirstReader(ranks, device, mesh) if mesh else Reader(_CPU if has_masters else device)
    other_reader = Reader(_CPU) if "reference" in offload and mesh is None else reader
    here: dict[str, Any] = {"path": str(checkpoint), "revision": None, "critic_path": None, "critic_revision": None}
    if model.lora is not None:
        here = {"lora": LoraConfig(path=str(checkpoint))}
    trained = model.model_copy(update=here) if checkpoint else model
    policy = load_actor_critic(trained, temperature, value_head_seed, reader, has_values)
    own = model.lora is not None and model.reference_path is None
    is_policy = checkpoint is None and model.reference == (model.path, model.trust)  # whose traits are known
    traits = policy.decoder.traits if is_policy else None
    given = (temperature, other_reader, traits, partial(offload.put_away, "reference"))
    reference = UnadaptedPolicy(policy) if own else load_reference(model, *given)
    tokenizer = reader.agree(lambda: load_tokenizer(model.path, model.trust))
    reader.find(lambda: _try_save(policy, tokenizer))
    for each in [policy] if own else [policy, reference]:
        if learner.compile:
            compile_layers(each)
        elif device.type == "cuda":
            fuse_norms(each, device)
    if learner.gradient_checkpointing:
        recompute_layers(policy)
    reduce_dtype = torch.bfloat16 if learner.reduce_dtype == "bfloat16" else None
    if isinstance(reader, FirstReader) and mesh is not None:
        how = (reader.shards, learner.reduce_gradients == "microbatch", reduce_dtype)
        sharding: Sharding = FullySharded(policy, reference, ranks, dtype, mesh, *how)
    else:
        place = device if has_masters else None
        sharding = Replicated(policy, ranks, dtype, reduce_dtype, device=place, offload=offload)
        if not own and (has_masters or other_reader is not reader):
            _place(reference, device, offload)
    offload.manage("reference", reference.parameters)
    if learner.compile:
        offload.fetch("reference")
        try_compilation(policy, reference, sharding, _compute_dtype(model))
        offload.put_away("reference")
    return LearnerModels(policy, reference, sharding, tokenizer, offload)


def _place(reference: ResponseLM, device: torch.device, offload: Offload) -> None:
    """Copy a reference to a device, and each of its parameters from there at once if they lie in host memory."""
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(device, copy=True)  # also on a CPU: what maps a file cannot be put away
        offload.put_away("reference", parameter)
    reference.to(device)


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
    model: ModelConfig, temperature: float, value_head_seed: int, reader: Reader, has_values: bool = True
) -> ActorCritic:
    """Load the policy with its value head or critic, or without; a value head that lies with its decoder is loaded too.

    If the policy computes in bfloat16, its parameters are float32: the masters are made of them. With adapters these
    are float32, and the frozen weights are of the type that the policy computes in, or codes that stand for them. A
    model is shared out before the next is read.

    Raises:
        InputError: a model cannot be loaded or is not supported.
    """
    lora, dtype, seed = model.lora, _master_dtype(model), derive_seed(value_head_seed, "lora")
    separate = has_values and model.critic == "separate"
    path, trust = _find_critic(model) if separate else (model.path, model.trust)
    causal_lm = reader.read(AutoModelForCausalLM, model.path, dtype, model.trust, model.quantization)
    traits = critic_traits = reader.find(lambda: ResponseLM(causal_lm, temperature=temperature).decoder.traits)
    critic: Any = None
    if lora is not None:
        if separate and (path, trust) == (model.path, model.trust):
            critic = _share_weights(find_decoder(causal_lm))
            reader.agree(lambda: _adapt(critic, model, lora, seed, is_critic=True))
        reader.agree(lambda: _adapt(causal_lm, model, lora, seed))
        _cast_base(causal_lm, model)
    reader.share_out(causal_lm)
    if separate and critic is None:
        critic = reader.read(AutoModel, path, dtype, trust, model.quantization)
        critic_traits = reader.find(lambda: Decoder(critic).traits)
        if lora is not None:
            reader.agree(lambda: _adapt(critic, model, lora, seed, is_critic=True))
    if separate:
        if lora is not None:
            _cast_base(critic, model)
        reader.share_out(critic)
    options: dict[str, Any] = {"temperature": temperature, "traits": traits}
    actor_critic: ActorCritic
    if not has_values:
        actor_critic = ActorCritic(causal_lm, **options)
    elif separate:
        options |= {"value_head_seed": value_head_seed, "critic_traits": critic_traits}
        actor_critic = CausalLMWithCritic(causal_lm, critic, **options)
    else:
        actor_critic = CausalLMWithValueHead(causal_lm, value_head_seed=value_head_seed, **options)
    actor_critic.adapted = lora is not None
    if has_values:
        reader.agree(lambda: _load_value_head(actor_critic, model, path, trust))
    return actor_critic


def _find_critic(model: ModelConfig) -> tuple[str, Trust]:
    """Return the path of a separate critic, and the trust in it: that which lies beside the policy, or the config's."""
    path, trust = model.critic_source
    trained = Path(model.path) / CRITIC_FOLDER
    return (str(trained) if model.critic_path is None and trained.is_dir() else path), trust


def _share_weights(decoder: Any) -> Any:
    """Return a second decoder on the very same parameters or codes, which are frozen: it gets adapters of its own."""
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    return copy.deepcopy(decoder, shared)


def _adapt(network: Any, model: ModelConfig, lora: LoraConfig, seed: int, is_critic: bool = False) -> None:
    """Freeze a policy's or critic's weights, and put adapters into it, new ones or those at `lora.path`."""
    from ppo_ray.models.adapter_files import CONFIG_FILE, load_adapters, make_adapter_config, make_critic_config
    from ppo_ray.models.lora import add_adapters

    config, path = make_adapter_config(lora, model.path), lora.path
    if is_critic:
        values = Path(path or "") / CRITIC_FOLDER
        config, seed = make_critic_config(config, lora, values, model.critic_source[0]), derive_seed(seed, "critic")
        path = str(values) if path is not None and (values / CONFIG_FILE).is_file() else None
    add_adapters(network, config, seed)
    if path is not None:
        load_adapters(network, path)


def _cast_base(network: Any, model: ModelConfig) -> None:
    """Cast frozen weights to the type that they are used in."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            cast(parameter, _compute_dtype(model))
    set_dtype(network, _compute_dtype(model))


def _load_value_head(actor_critic: ActorCritic, model: ModelConfig, path: str, trust: Trust) -> None:
    """Load the value head that lies with its decoder at `path`, or with the adapters; else it is as it was drawn."""
    assert actor_critic.value_head is not None
    if model.value_head_init == "zeros":
        for parameter in actor_critic.value_head.parameters():
            torch.nn.init.zeros_(parameter)
    actor_critic.load_value_head(path, **trust.place)
    if model.lora is not None and model.lora.path is not None:
        adapters = Path(model.lora.path) / (CRITIC_FOLDER if model.critic == "separate" else "")
        if adapters.is_dir():
            actor_critic.load_value_head(adapters)


def load_reference(
    model: ModelConfig,
    temperature: float,
    reader: Reader,
    traits: Traits | None = None,
    take: Callable[[torch.Tensor], None] | None = None,
) -> ResponseLM:
    """Load the frozen reference, in the type it computes in: `model.reference_path`, or the policy as it starts.

    Args:
        model: which models.
        temperature: at which responses are sampled.
        reader: of the models.
        traits: of its decoder, if the same model was read and checked before; None: it is checked.
        take: as in `share_out`.

    Raises:
        InputError: it cannot be loaded or is not supported.
    """
    path, trust = model.reference
    causal_lm = reader.read(AutoModelForCausalLM, path, _master_dtype(model), trust)
    if traits is None:  # checked in float32, where rounding hides nothing
        traits = reader.find(lambda: ResponseLM(causal_lm, temperature=temperature).decoder.traits)
    _cast_base(causal_lm.requires_grad_(False), model)
    reader.share_out(causal_lm, take)
    return ResponseLM(causal_lm, temperature=temperature, traits=traits)


def _compute_dtype(model: ModelConfig) -> torch.dtype:
    """Return the type of the parameters that forward passes use."""
    return getattr(torch, model.dtype)


def _master_dtype(model: ModelConfig) -> str:
    """Return the type of the parameters that the optimizer steps: float32 under bfloat16, which would lose 1e-5."""
    return "float32" if model.dtype == "bfloat16" else model.dtype
