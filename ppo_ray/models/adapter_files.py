"""The files of adapters, as peft writes and reads them: read strictly, written the same in every process."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import safetensors
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from ppo_ray.config import DEFAULT_RANK, LoraConfig, ModelConfig
from ppo_ray.errors import InputError, first_line
from ppo_ray.models.lora import ADAPTER, adapter_parameters, add_adapters, find_target_problem, is_adapter
from ppo_ray.models.quantization import MISSING
from ppo_ray.models.saving import State, write_tensors
from ppo_ray.models.tensors import list_names

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The files of adapters, for `PeftModel.from_pretrained`."""
_PREFIX = "base_model.model."  # of the names in peft's files
_KEPT = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora"}
_KEPT |= {"rank_pattern", "alpha_pattern"}
"""What is taken of an adapter's config."""
_IDLE = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
_IDLE |= {"peft_version", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "megatron_core", "qalora_group_size"}
"""What says nothing of the weights of adapters that are trained; dropout is off here."""
_PLAIN_STARTS = (None, True, False, "gaussian")


def make_adapter_config(lora: LoraConfig, base: str, task: str = "CAUSAL_LM") -> peft.LoraConfig:
    """Make peft's config of new adapters, or read that of existing ones.

    Args:
        lora: the options.
        base: folder or hub name of the model that they adapt.
        task: peft's name of what the model is for.

    Raises:
        InputError: there are no adapters at `lora.path`, they are of another base, or of a kind that is not computed.
    """
    if lora.path is None:
        rank = lora.rank or DEFAULT_RANK
        targets: Any = "all-linear" if lora.targets is None else list(lora.targets)
        options: dict[str, Any] = {"r": rank, "lora_alpha": lora.alpha or 2 * rank, "target_modules": targets}
    else:
        options = _read_options(lora.path, base)
    absolute = str(Path(base).absolute()) if Path(base).is_dir() else base
    return peft.LoraConfig(**options, task_type=task, base_model_name_or_path=absolute)


def make_critic_config(config: peft.LoraConfig, lora: LoraConfig, critic: Path, base: str) -> peft.LoraConfig:
    """Make the config of a separate critic's adapters: as the policy's, or that of those which lie beside them.

    Args:
        config: of the policy's adapters.
        lora: the options.
        critic: folder of the critic's adapters, which may not be there.
        base: folder or hub name of the model that they adapt.

    Raises:
        InputError: as `make_adapter_config`.
    """
    task = "FEATURE_EXTRACTION"
    if lora.path is None:
        return make_adapter_config(lora, base, task)
    if (critic / CONFIG_FILE).is_file():
        return make_adapter_config(LoraConfig(path=str(critic)), base, task)
    own = copy.deepcopy(config)
    own.task_type, own.base_model_name_or_path = task, make_adapter_config(LoraConfig(), base).base_model_name_or_path
    # the policy's names begin with the part of it that a critic is
    ends: Any = {name.rpartition(".")[2] for name in config.target_modules or ()}
    own.target_modules = "all-linear" if isinstance(config.target_modules, str) else ends
    return own


def _read_options(path: str, base: str) -> dict[str, Any]:
    """Read the options of existing adapters; raises as `make_adapter_config`."""
    try:
        content = json.loads(Path(find_file(path, CONFIG_FILE)).read_text(encoding="utf-8"))
        found = dict(content.items())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no adapters: its {CONFIG_FILE} cannot be read: {first_line(error)}") from error
    if problem := find_kind_problem(found):
        raise InputError(f"the adapters at {path} {problem}")
    theirs = found.get("base_model_name_or_path")
    if theirs and not _is_same_model(str(theirs), base):
        raise InputError(
            f"the adapters at {path} are of another base: {theirs}, and model.path is {base}. Give that one; if it is "
            f"the same model at another place, write this place into base_model_name_or_path of {CONFIG_FILE}"
        )
    return {name: value for name, value in found.items() if name in _KEPT and value is not None}


def find_kind_problem(options: dict[str, Any]) -> str | None:
    """Say why adapters of these options, as peft writes them, are not computed here; None: they are plain LoRA."""
    if options.get("peft_type") != "LORA":
        return f"are of the kind {options.get('peft_type')}, and LORA alone is trained here"
    taken = _KEPT | _IDLE | {"loftq_config", "runtime_config"}
    others = {name: value for name, value in options.items() if name not in taken and value not in (None, "none")}
    others = {name: value for name, value in others.items() if value not in (False, [], {})}
    if options.get("init_lora_weights") not in _PLAIN_STARTS:
        others["init_lora_weights"] = options["init_lora_weights"]
    if not others:
        return None
    return f"are no plain LoRA ({others}) and would be computed wrongly; merge them into the base, and give new ones"


def _is_same_model(theirs: str, ours: str) -> bool:
    """Say whether two names are of one model, as far as names tell: it may have been moved or downloaded."""
    if Path(theirs).is_dir() and Path(ours).is_dir():
        return Path(theirs).resolve() == Path(ours).resolve()
    return Path(theirs).name == Path(ours).name


def find_file(path: str, name: str) -> str:
    """Return the path of a file of adapters, from a folder or a hub; raises OSError."""
    return str(Path(path) / name) if Path(path).is_dir() else cached_file(path, name)


def save_adapters(model: Any, folder: Path, state: State) -> None:
    """Write adapters for `PeftModel.from_pretrained`.

    Args:
        model: that has them.
        folder: made if it is not there.
        state: their tensors by the model's names.
    """
    save_adapter_config(model, folder)
    write_tensors(folder / WEIGHTS_FILE, name_adapters(state))


def save_adapter_config(model: Any, folder: Path) -> None:
    """Write the config of a model's adapters, for `PeftModel.from_pretrained`; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[ADAPTER].save_pretrained(folder)


def name_adapters(state: State) -> State:
    """Return the tensors of adapters, which have a model's names, under those that peft gives them in a file."""
    return {_file_name(name): tensor for name, tensor in state.items()}


@torch.no_grad()
def load_adapters(model: Any, path: str) -> None:
    """Copy the adapters of a folder or hub name into those of a model.

    Raises:
        InputError: they cannot be read, are not those of this model, or hold NaN.
    """
    for parameter, tensor in check_tensors(model, path):
        parameter.copy_(tensor)


def check_tensors(model: Any, path: str) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return each parameter of a model's adapters with its tensor in a folder or hub name; raises as `load_adapters`.

    Args:
        model: with adapters, on any device, the meta device too.
        path: folder or hub name.
    """
    try:
        found = safetensors.torch.load_file(find_file(path, WEIGHTS_FILE))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"the adapters at {path} cannot be read ({WEIGHTS_FILE}): {first_line(error)}") from error
    wanted = {_file_name(name): parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    other = "they are of another base, or the file is damaged"
    if differing := wanted.keys() ^ found.keys():
        raise InputError(f"the adapters at {path} do not fit the model, {other}: names differ, {list_names(differing)}")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            shapes = f"{list(found[name].shape)}, the model's is {list(parameter.shape)}"
            raise InputError(f"the adapters at {path} do not fit the model, {other}: {name} is {shapes}")
        if not found[name].isfinite().all():
            raise InputError(f"the adapters at {path} hold NaN or infinite weights ({name}); their file is damaged")
    return [(parameter, found[name]) for name, parameter in wanted.items()]


def read_adapter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a policy's adapters, by the names that they travel by; no weights are read.

    Raises:
        InputError: they do not fit the model; as `make_adapter_config` and `add_adapters`.
    """
    assert model.lora is not None
    code = model.trust.remote_code
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=code, **model.trust.place)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    add_adapters(empty, make_adapter_config(model.lora, model.path), 0)
    return {name: tuple(tensor.shape) for name, tensor in adapter_parameters(empty).items()}


def check_adapters(empty: Any, model: ModelConfig, path: str, is_critic: bool) -> None:
    """Put adapters into a model on the meta device, which costs no memory.

    Args:
        empty: the model.
        model: the options, with adapters.
        path: folder or hub name of the model.
        is_critic: whether it is a separate critic, whose adapters are checked as they are read.

    Raises:
        InputError: they do not fit it, or what makes codes of its weights is missing.
    """
    lora = model.lora
    assert lora is not None
    if model.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"model.quantization={model.quantization} {MISSING}")
    if problem := find_target_problem(empty, lora):
        raise InputError(f"model.lora.targets: {problem}")
    if is_critic and lora.path is not None:
        return
    try:
        adapters = make_adapter_config(lora, path)
    except InputError:  # is said by itself
        return
    add_adapters(empty, adapters, 0)
    if lora.path is not None:
        check_tensors(empty, lora.path)


def _file_name(name: str) -> str:
    """Return peft's name, in a file, of a parameter of adapters."""
    return _PREFIX + name.replace(f".{ADAPTER}.", ".")
