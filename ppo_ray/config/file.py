"""The reader of a YAML file and `key=value` overrides into a pydantic model; it reports every mistake by its key."""

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ppo_ray.config.explain import all_options, explain, explain_unknown, section_of
from ppo_ray.errors import InputError, first_line

_OVERRIDE = re.compile(r"\w+(\.\w+)*=")
_SHOWN = 20  # problems; a file of another program has thousands
_LONGEST_LINE = 500  # characters of a problem: the value may be a whole file
_DEEPEST = 20  # levels of sections and lists; YAML's C parser overflows the stack at some thousands
_LONGEST_VALUE = 10_000  # characters, interpolations resolved
_INTERPOLATION = re.compile(r"\$\{(oc\.env:(?P<name>\w+)(,(?P<default>[^{}]*))?|(?P<key>\w+(\.\w+)*))\}")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)(KEY|PWD)($|_)|APIKEY", re.IGNORECASE)
_MOST_NODES = 50_000  # keys and values of a file, aliases expanded

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Contradiction:
    """Options that are right alone and wrong together."""

    keys: tuple[str, ...]
    """Dotted names; the message is shown under the first."""
    message: str


class Contradictions(ValueError):
    """Raised by a model's own validator, so that `load` can report each contradiction under its key."""

    def __init__(self, found: Sequence[Contradiction]) -> None:
        """Keep the contradictions; the error's text is for code that builds the model without a file."""
        super().__init__("; ".join(f"{item.keys[0]}: {item.message}" for item in found))
        self.found = tuple(found)


def load(
    model: type[Model], path: Path | None, overrides: Sequence[str], given: Mapping[str, Any] | None = None
) -> Model:
    """Read a YAML file (None: an empty one), apply the overrides and validate.

    Args:
        model: what it becomes.
        path: the file.
        overrides: `key=value` each.
        given: options by their dotted names, instead of a file.

    Raises:
        InputError: the file cannot be read, or something in it or in the overrides is wrong; a line for each violation.
    """
    options = _read(path)
    for key, value in (given or {}).items():
        OmegaConf.update(options, key, value, force_add=True)
    options, problems = _merge(model, options, overrides)
    raw = _add_missing_sections(model, options)
    try:
        config = model.model_validate(raw)
    except ValidationError as error:
        problems += _describe(model, raw, error)
    if problems:
        source = f" in {path}" if path else ""
        heading = f"{len(problems):,} problems" if len(problems) > 1 else "1 problem"
        more = [f"... and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
        shown = [_shorten(line) for line in problems[:_SHOWN]] + more
        raise InputError("\n".join([f"{heading}{source}", *(f"  {line}" for line in shown)]))
    return config


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file as it stands, interpolations unresolved, by dotted names.

    Raises:
        InputError: it cannot be read, or is no config.
    """
    return dict(flatten(OmegaConf.to_container(_read(path), resolve=False)))


def flatten(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value with its dotted name; a list is one value."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shorten(line: str) -> str:
    """Cut a line that is too long to be read, and escape what cannot be printed: it could move a terminal's cursor."""
    more = f"... ({len(line):,} characters)" if len(line) > _LONGEST_LINE else ""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line[:_LONGEST_LINE]) + more


def _read(path: Path | None) -> Any:
    """Read a YAML file into an OmegaConf mapping, interpolations not yet resolved."""
    if path is None:
        return OmegaConf.create({})
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        if text is not None and _is_too_deep(text):
            raise InputError(f"config file {path}: more than {_DEEPEST} levels, one in another; a config has two")
        options = None if text is None else OmegaConf.create(text, max_yaml_expanded_nodes=_MOST_NODES)
    except yaml.YAMLError as error:
        if "node expansion exceeds" in str(error):
            limit = f"holds more than {_MOST_NODES:,} keys and values, aliases expanded"
            raise InputError(f"config file {path} {limit}; is it a config?") from error
        raise InputError(f"config file {path} is not valid YAML: {error}") from error
    except (OSError, ValueError, OmegaConfBaseException) as error:  # ValueError: no UTF-8, a number of 5,000 digits
        raise InputError(f"config file {path} cannot be read: {error}") from error
    if options is None and path.is_dir():
        raise InputError(f"config file {path} is a folder; give a file, e.g. {path / 'config.yaml'}")
    if options is None:
        hint = "; the config file comes before the key=value overrides" if "=" in str(path) else ""
        raise InputError(f"config file {path} does not exist{hint}")
    if not OmegaConf.is_dict(options):
        raise InputError(f"config file {path} must hold `key: value` lines, not a list")
    return options


def _is_too_deep(text: str) -> bool:
    """Say whether a YAML text nests deeper than any config; text that is no YAML is reported later."""
    if len(text) <= _DEEPEST:
        return False
    depth = 0
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                return True
    return False


def _merge(model: type[BaseModel], options: Any, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Apply overrides, resolve interpolations; return the options as plain containers, and a line for each problem."""
    known = set(dict(all_options(model)))
    well_formed: list[str] = []
    problems: list[str] = []
    unknown: dict[str, None] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if not _OVERRIDE.match(override):
            problems.append(f"{override}: not an override; write section.option=value, e.g. ppo.learning_rate=1e-5")
        elif key not in known:
            section = key.partition(".")[0]
            unknown[key if section in known else section] = None
        elif _is_too_deep(value):
            problems.append(f"{key}: more than {_DEEPEST} levels, one in another; no option has two")
        else:
            well_formed.append(override)
    problems += [f"{key}: {explain_unknown(model, key)}" for key in list(unknown)[:_SHOWN]]
    problems += [f"{key}: unknown option" for key in list(unknown)[_SHOWN:]]  # counted, not shown
    with contextlib.suppress(yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError):
        options, well_formed = OmegaConf.merge(options, OmegaConf.from_dotlist(well_formed)), []
    for override in well_formed:  # one of them is wrong: each is set by itself, as merging again would copy all options
        key, _, value = override.partition("=")
        try:
            options.merge_with_dotlist([override])
        except yaml.YAMLError:
            problems.append(f"{key}: {value!r} is not valid YAML; put it in quotes twice: {key}='\"...\"'")
        except UnicodeEncodeError:
            problems.append(f"{key}: {value!r} is not valid Unicode")
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            section = key.rpartition(".")[0]
            in_list = section and OmegaConf.is_list(options.get(section))
            problems.append(f"{key}: {section + ' is a list, not a section' if in_list else first_line(error)}")
    if odd := list(_interpolation_problems(OmegaConf.to_container(options, resolve=False))):
        raise InputError("\n".join(_shorten(line) for line in odd[:_SHOWN]))
    try:
        resolved = OmegaConf.to_container(options, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(_shorten(f"{error.full_key or 'config'}: {first_line(error)}")) from error
    return {str(key): value for key, value in resolved.items()}, problems  # type: ignore[union-attr]


def _interpolation_problems(options: Any) -> Iterator[str]:
    """Yield a line for each interpolation that is not allowed, or that makes a value too long.

    One that refers to another could double a value's length at each level. A secret would be written into the run's
    config.yaml and into every checkpoint.
    """
    values = dict(flatten(options))
    for key, value in values.items():
        if "${" not in str(value):
            continue
        length = len(str(value))
        for found in re.finditer(r"\$\{([^}]*)\}?", str(value)):
            match = _INTERPOLATION.fullmatch(found[0])
            if not match:
                yield f"{key}: {found[0]} is neither ${{oc.env:NAME}} nor ${{section.option}}"
            elif (name := match["name"]) is not None:
                if SECRET.search(name):
                    yield f"{key}: {found[0]} would write a secret into the run's config.yaml; leave it out"
                length += len(os.environ.get(name, match["default"] or ""))
            elif match["key"] not in values or "${" in str(values[match["key"]]):
                yield f"{key}: {found[0]} must name an option of the file that is not made of others itself"
            else:
                length += len(str(values[match["key"]]))
        if length > _LONGEST_VALUE:
            yield f"{key}: {length:,} characters with what it refers to, more than {_LONGEST_VALUE:,}"


def _add_missing_sections(model: type[BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """Add absent and empty sections as empty ones, so that a missing option in them is reported by its full name."""
    sections = [name for name, field in model.model_fields.items() if section_of(field)]
    return {**options, **{name: {} for name in sections if options.get(name) is None}}


def _describe(model: type[BaseModel], raw: dict[str, Any], error: ValidationError) -> list[str]:
    """Return a line for each violation, and for each contradiction among the options that are right."""
    details = error.errors()
    contradictions = _find_contradictions(error)
    if not contradictions:
        contradictions = _find_more_contradictions(model, raw, details)
    wrong = {_key(detail) for detail in details}
    located = [detail for detail in details if detail["loc"]]
    lines = [f"{_key(detail)}: {explain(model, detail)}" for detail in located[:_SHOWN]]
    lines += [f"{_key(detail)}: {detail['msg']}" for detail in located[_SHOWN:]]  # counted, not shown
    lines += [f"{item.keys[0]}: {item.message}" for item in contradictions if not wrong.intersection(item.keys)]
    return lines


def _find_contradictions(error: ValidationError) -> tuple[Contradiction, ...]:
    """Return the contradictions that a model's own validator has found."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            return cause.found
    return ()


def _find_more_contradictions(
    model: type[BaseModel], raw: dict[str, Any], details: Sequence[ErrorDetails]
) -> tuple[Contradiction, ...]:
    """Validate again without the wrong options: pydantic compares options only where each is right by itself."""
    rest = copy.deepcopy(raw)
    for detail in details:
        *sections, name = [str(part) for part in detail["loc"]]
        holder = rest
        for section in sections:
            holder = holder[int(section) if isinstance(holder, list) else section]
        if isinstance(holder, list):
            holder.clear()  # one of its entries is wrong
        elif detail["type"] == "missing":
            holder[name] = "missing"
        else:
            holder.pop(name, None)
            if detail["type"] == "model_type":
                holder[name] = {}
    try:
        model.model_validate(rest)
    except ValidationError as error:
        return _find_contradictions(error)
    return ()


def _key(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])
