"""Tables of all options: name, values, default and meaning, read from the models that validate them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ppo_ray.config.run import Config
from ppo_ray.config.sections import ModelSource
from ppo_ray.errors import InputError

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
FIRST = {
    "model.path": ("Train your own model.", "a folder, or a name of the hub"),
    "prompts.path": ("Use your own prompts.", "a file, a folder or a hub data set; `prompts.column` names the column"),
    "reward.function": ("Score with your own code.", "`module:function`; or `reward.path` for a classifier"),
    "steps": ("Train for longer.", "a finished run goes on with `--resume steps=...`"),
    "ppo.learning_rate": ("Learn faster, or more steadily.", "lower it if `policy/approx_kl` is above 0.1"),
    "rollout.batch_size": ("Have less noise in each step.", "more responses per step; a step takes longer"),
    "rollout.max_response_tokens": ("Allow longer answers.", "raise it if `response/eos_rate` falls to 0"),
    "ppo.kl_coef": ("Keep the policy near its start.", "raise it if the score rises and the samples get worse"),
    "learner.microbatch_tokens": ("Need less memory.", "halve it; results do not change"),
    "evaluation.every_steps": ("See whether it learns.", "10: the held-out score every ten steps"),
}
"""The options to touch first: the goal, and how to reach it."""
_PAGE = """# Options

Every option can be in a YAML file, and on the command line as `key=value`. `ppo-ray options` shows them all,
`ppo-ray options rollout` those of a section.

## Ten options to touch first

| goal | option | how |
|---|---|---|
{first}

[diagnostics.md](diagnostics.md#symptoms) goes from what you see to what to change. [gpus.md](gpus.md) is about GPUs.
"""


@dataclass(frozen=True)
class Option:
    """One option."""

    name: str
    """Dotted, as it is given on the command line."""
    values: str
    """The values that it may have."""
    default: str
    """As it is written in YAML; empty for one that must be given."""
    meaning: str
    """Its docstring, in one line."""


@dataclass(frozen=True)
class OptionTable:
    """The options of a section, or those of no section."""

    name: str
    """Of the section; empty for those of no section."""
    meaning: str
    """The section's docstring, in one line."""
    options: tuple[Option, ...]


def make_tables() -> list[OptionTable]:
    """Return the options of each section, in the order of `Config`, those of no section first.

    In a section the options of what is trusted come last.
    """
    schema = Config.model_json_schema()
    sections = {name: schema["$defs"][target] for name, target in _sections(schema).items()}
    found = [OptionTable("", "The run.", tuple(_options("", schema)))]
    for name, section in sections.items():
        found.append(OptionTable(name, _line(section), tuple(_options(f"{name}.", section))))
        for inner, target in _sections(section).items():  # those that may be null
            nested = schema["$defs"][target]
            found.append(OptionTable(f"{name}.{inner}", _line(nested), tuple(_options(f"{name}.{inner}.", nested))))
    return found


def find_table(section: str) -> OptionTable:
    """Return the options of one section.

    Raises:
        InputError: there is no such section.
    """
    found = {table.name: table for table in make_tables() if table.name}
    if section not in found:
        raise InputError(f"{section} is no section of a config; there are {', '.join(found)}")
    return found[section]


def print_tables(section: str | None) -> None:
    """Print the options of a section, or of all.

    Raises:
        InputError: there is no such section.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for table in [find_table(section)] if section else make_tables():
        shown = Table("option", "", title=table.meaning, box=box.SIMPLE_HEAD, title_justify="left")
        shown.columns[0].no_wrap = True
        for option in table.options:
            default = f"default {option.default}" if option.default else "required"
            about = f"{option.meaning}\n{option.values.replace('`', '')}; {default}"
            shown.add_row(option.name, escape(about))
        Console().print(shown)


def to_markdown() -> str:
    """Return docs/options.md."""
    first = "\n".join(f"| {goal} | `{name}` | {how} |" for name, (goal, how) in FIRST.items())
    parts = [_PAGE.format(first=first)]
    for table in make_tables():
        rows = [
            f"| `{option.name}` | {option.values} | {f'`{option.default}`' if option.default else 'required'} "
            f"| {option.meaning.replace('|', chr(92) + '|')} |"
            for option in table.options
        ]
        heading = f"## {table.name or 'The run'}\n\n" + (f"{table.meaning}\n\n" if table.name else "")
        parts.append(heading + "\n".join(["| option | values | default | |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _sections(schema: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each section's definition."""
    fields = schema["properties"].items()
    references = {name: field.get("$ref") or field.get("anyOf", [{}])[0].get("$ref") for name, field in fields}
    return {name: reference.rpartition("/")[2] for name, reference in references.items() if reference}


def _options(prefix: str, schema: Mapping[str, Any]) -> Iterator[Option]:
    fields = schema["properties"]
    for name in sorted(fields, key=ModelSource.model_fields.__contains__):
        field = fields[name]
        if "$ref" not in field:
            default = json.dumps(field["default"], ensure_ascii=False).strip('"') if "default" in field else ""
            yield Option(prefix + name, _values(field), default, _line(field))


def _values(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return ", ".join(_values(one) for one in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}"
    if field.get("type") == "object" or "$ref" in field:
        return "options"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    bounds = [f"{sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field and field[bound] < 2**53]
    return " ".join([_TYPES[field["type"]], ", ".join(bounds)]).strip()


def _line(schema: Mapping[str, Any]) -> str:
    return " ".join(schema["description"].split())
