"""Words for what is wrong in a config: the value, the limit, the remedy; and the option that was most likely meant."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

ABBREVIATIONS = {
    "lr": "ppo.learning_rate",
    "bs": "rollout.batch_size",
    "mbs": "ppo.minibatch_size",
    "kl": "ppo.kl_coef",
    "beta": "ppo.kl_coef",
    "lambda": "ppo.gae_lambda",
    "eps": "ppo.clip_range",
    "epsilon": "ppo.clip_range",
    "grad_clip": "ppo.max_grad_norm",
    "temp": "rollout.temperature",
    "tp": "rollout.tensor_parallel",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_length": "rollout.max_context",
    "bf16": "model.dtype",
    "model": "model.path",
    "model_name": "model.path",
    "dataset": "prompts.path",
    "reward_model": "reward.path",
    "fsdp": "learner.sharding",
    "fsdp_size": "learner.shard_size",
    "optimizer_offload": "learner.offload",
    "adam_offload": "learner.offload",
    "torch_compile": "learner.compile",
}
"""Short or foreign names of options, each with the option that is meant."""
FOREIGN_VALUES = {
    "ppo.policy_loss": {
        **dict.fromkeys(("ppo", "ppo_clip", "vanilla", "surrogate"), "clip"),
        **dict.fromkeys(("grpo", "dr_grpo", "rloo", "reinforce"), "clip, with ppo.advantages={value}"),
    },
    "ppo.advantages": {
        **dict.fromkeys(("ppo", "lambda", "vapo"), "gae"),
        **dict.fromkeys(("reinforce++", "reinforce_plus_plus", "reinforce_pp"), "reinforce"),
        "reinforce_plus_plus_baseline": "reinforce_baseline",
        **dict.fromkeys(("drgrpo", "dr.grpo"), "dr_grpo"),
        **dict.fromkeys(("gspo", "cispo"), "grpo, with ppo.policy_loss={value}"),
    },
}
"""Values that other libraries or papers have for an option, each with what is meant here."""
_LONGEST_KEY = 100  # characters; a longer one is no misspelt option, and comparing spellings takes time


def explain(model: type[BaseModel], detail: ErrorDetails) -> str:
    """Return the message of one violation: the value, the limit, the remedy."""
    kind, value, context = detail["type"], _show(detail["input"]), detail.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return explain_unknown(model, ".".join(str(part) for part in detail["loc"]))
        case "missing":
            return "required, but not given"
        case "int_type" | "int_parsing" | "int_from_float":
            return f"{value} is not a whole number"
        case "float_type" | "float_parsing":
            return f"{value} is not a number"
        case "bool_type" | "bool_parsing":
            return f"{value} is neither true nor false"
        case "string_type":
            return f"{value} is not text" + ("" if value == "null" else f"; write it in quotes: \"'{value}'\"")
        case "model_type":
            return f"{value} is not a section of options"
        case "literal_error":
            names = re.findall(r"'([^']*)'", context["expected"])
            return f"{value} is not one of {context['expected']}" + _suggest_value(detail, names)
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            relation = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
            limit, words = next((context[key], words) for key, words in relation.items() if key in context)
            return f"{value} must be {words} {limit:g}"
        case "finite_number":
            return f"{value} must be a finite number"
        case "string_too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            pattern = context["pattern"]
            names = re.findall(r"(?<=[(|])\w+(?=\|)", pattern)
            if not names:
                return f"{value} must " + (
                    "look like package.module:function" if ":" in pattern else f"match {pattern}"
                )
            found = f"{value} is not one of {', '.join(names)}, and does not look like package.module:function"
            return found + _suggest_value(detail, names)
        case "value_error":
            return str(context["error"])
        case _:
            return f"{value}: {detail['msg']}"


def _show(value: Any) -> str:
    """Write a value as in YAML, except that text is in quotes."""
    return str(value).lower().replace("none", "null") if value is None or isinstance(value, bool) else repr(value)


def _suggest_value(detail: ErrorDetails, names: Sequence[str]) -> str:
    """Name the value that was most likely meant: by another library's name, or by spelling; else nothing."""
    value = str(detail["input"]).lower()
    if len(value) > _LONGEST_KEY:
        return ""
    foreign = FOREIGN_VALUES.get(".".join(str(part) for part in detail["loc"]), {})
    near = [foreign[value].format(value=value)] if value in foreign else difflib.get_close_matches(value, names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def explain_unknown(model: type[BaseModel], key: str) -> str:
    """Say why there is no such option, or which one was most likely meant."""
    if len(key) > _LONGEST_KEY:
        return "unknown option"
    return _refusal(model, key) or "unknown option" + _suggest(model, key)


def _refusal(model: type[BaseModel], key: str) -> str | None:
    """Return why an option that people look for is refused; None for any other."""
    section, _, leaf = key.rpartition(".")
    fields = dict(all_options(model))
    holder = section_of(fields[section]) if section in fields else model
    reason: str | None = getattr(holder, "refused", {}).get(leaf)
    return reason


def _suggest(model: type[BaseModel], key: str) -> str:
    """Name the known option that was most likely meant: by TRL's name, in another section, or by spelling."""
    known = dict(all_options(model))
    leaf = key.rpartition(".")[2]
    trl = {name: _trl_names(field).index(leaf) for name, field in known.items() if leaf in _trl_names(field)}
    if trl:
        return f"; TRL's {leaf} is {min(trl, key=lambda name: trl[name])} here"
    leaves = {name: name.rpartition(".")[2] for name in known}
    near = [ABBREVIATIONS[leaf]] if leaf in ABBREVIATIONS else [name for name in known if leaves[name] == leaf]
    near = near or [name for name in known if leaf and leaves[name] in (f"{leaf}s", leaf.removeprefix("num_"))]
    near = near or difflib.get_close_matches(key, known, n=1)
    near = near or [name for name in known if difflib.get_close_matches(leaf, [leaves[name]], cutoff=0.8)]
    return f"; did you mean {' or '.join(near)}?" if near else "; `ppo-ray options` shows all there are"


def _trl_names(field: FieldInfo) -> list[str]:
    """Return the names that TRL has for an option, by the option's documentation; the main one first."""
    return re.findall(r"`(\w+)`", (field.description or "").partition("TRL:")[2])


def all_options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every option with its dotted name, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_of(field)
        if section:
            yield from all_options(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section of options, or one that may be null; None for an option."""
    kinds = get_args(field.annotation) if type(None) in get_args(field.annotation) else (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
