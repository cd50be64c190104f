"""The options of experiment trackers, and what is found wrong with them before anything starts."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ppo_ray.config.file import SECRET, Contradiction, flatten
from ppo_ray.config.sections import Section
from ppo_ray.errors import InputError


@dataclass(frozen=True)
class Library:
    """What a built-in tracker needs."""

    modules: tuple[str, ...]
    """That must be importable, the library's own first."""
    key_variables: tuple[str, ...] = ()
    """Environment variables, one of which holds the secret that the library sends."""
    host: str = ""
    """Whose line in a .netrc file is a secret too."""


LIBRARIES: Mapping[str, Library] = {
    "wandb": Library(("wandb",), ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"), "api.wandb.ai"),
    "mlflow": Library(("mlflow",)),
    "trackio": Library(("trackio",)),
    "swanlab": Library(("swanlab",), ("SWANLAB_API_KEY",), "swanlab"),
}
"""By the tracker's name, which is the name of the extra that installs it."""

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in LIBRARIES and not _OWN.fullmatch(name):
            raise ValueError(f"{name!r} is no tracker; there are {', '.join(LIBRARIES)}, and a class as module:Class")
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(names)}: one is named twice")
    return names


class TrackingConfig(Section):
    """Experiment trackers that a run's figures are sent to. docs/tracking.md has examples."""

    trackers: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_names)] = ()
    """Names of trackers, several at once: wandb, mlflow, trackio, swanlab, or "package.module:Class" of one's own. Each
    runs in a process of its own, and neither ends nor delays the run. Keys are read from the environment, e.g.
    WANDB_API_KEY."""
    options: dict[str, dict[str, Any]] = Field(default={})
    """What each tracker is given, by its name, e.g. {wandb: {entity: us, tags: [imdb]}, mlflow: {tracking_uri:
    "sqlite:///runs.db"}}. wandb, trackio and swanlab: arguments of their `init`. One's own: arguments of the class."""
    project: str = Field(default="ppo_ray", min_length=1)
    """Name of the project or experiment that the run is filed under."""
    num_samples: int = Field(default=16, ge=0)
    """Number of a step's responses that are sent as a table, the first of the batch; 0: none."""
    samples_every_steps: int = Field(default=10, ge=1)
    """Steps from one table of responses to the next, the first step's included."""
    only_checkpointed: bool = False
    """Whether a step is sent only once a checkpoint holds it. false: at once. A run that was killed makes the steps
    after its newest checkpoint again, and a tracker keeps them as they were first. true: a tracker holds what
    metrics.jsonl holds, to the last digit and second."""
    close_timeout_s: float = Field(default=60.0, gt=0)
    """Time limit for what is still to be sent at the end of the run, seconds. `ppo-ray track CONFIG` sends the rest."""


def tracking_contradictions(tracking: TrackingConfig) -> Iterator[Contradiction]:
    """Yield options of no tracker, and those that would write a secret into config.yaml."""
    for name, options in tracking.options.items():
        if name not in tracking.trackers:
            yield Contradiction(
                ("tracking.options", "tracking.trackers"), f"{name} is none of the trackers; name it there, or drop it"
            )
        for key, value in flatten(options):
            if SECRET.search(key) or _holds_secret(value):
                variables = " or ".join(_variables(name)) or "an environment variable that the tracker reads"
                yield Contradiction(
                    ("tracking.options",),
                    f"{name}.{key}: would write a secret into the run's config.yaml; leave it out, and set {variables}",
                )


def tracking_problems(config: TrackingConfig) -> Iterator[str]:
    """Yield a line for each tracker whose library is not installed, or that has nothing to log in with.

    No library is imported; the module of a class of the user's own is.
    """
    for name in config.trackers:
        library = LIBRARIES.get(name)
        if library is None:
            try:
                find_class(name)
            except InputError as error:
                yield str(error)
            continue
        missing = [module for module in library.modules if importlib.util.find_spec(module) is None]
        if missing:
            yield (
                f"tracking.trackers={name}: {missing[0]} is not installed; pip install {missing[0]}, or "
                f"pip install 'ppo-ray[{name}]'"
            )
        elif library.key_variables and _is_online(name, config.options.get(name, {})) and not _has_key(library):
            yield (
                f"tracking.trackers={name}: no {library.key_variables[0]} in the environment, and no login of "
                f"{name} login; set one, or tracking.options.{name}.mode=offline"
            )


def find_class(name: str) -> type:
    """Import a tracker's class by name.

    Args:
        name: `package.module:Class`; the module must be importable, or lie in the current folder.

    Raises:
        InputError: there is none, or its module cannot be imported.
    """
    module_name, _, class_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # the last, so that it hides nothing
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # whatever the user's own module raises when it is imported
        raise InputError(
            f"tracking.trackers={name}: importing it raised {type(error).__name__}: {error}; its folder must be the "
            "current one, or on PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise InputError(f"tracking.trackers={name}: is a {type(found).__name__}, not a class")
    return found


def _variables(name: str) -> tuple[str, ...]:
    known = {"mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"), "trackio": ("TRACKIO_WRITE_TOKEN",)}
    return known.get(name) or (LIBRARIES[name].key_variables[:1] if name in LIBRARIES else ())


def _holds_secret(value: Any) -> bool:
    """Say whether a value is an address with a password, or with a token in its query."""
    if not isinstance(value, str) or "://" not in value:
        return False
    try:
        parts = urlsplit(value)
        return bool(parts.password) or SECRET.search(parts.query) is not None
    except ValueError:  # half an IPv6 address
        return "@" in value


def _is_online(name: str, options: Mapping[str, Any]) -> bool:
    mode = options.get("mode") or os.environ.get(f"{name.upper()}_MODE") or "online"
    return mode in ("online", "cloud")


def _has_key(library: Library) -> bool:
    """Say whether a variable holds a key, or a file of the home folder that the library's login writes."""
    if any(os.environ.get(variable) for variable in library.key_variables):
        return True
    name = library.modules[0]
    host = urlsplit(os.environ.get(f"{name.upper()}_BASE_URL", "")).hostname or library.host
    files = [Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc"), Path(f"~/.{name}/.netrc")]
    for path in (file.expanduser() for file in files):
        if path.is_file() and host in path.read_text(encoding="utf-8", errors="replace"):
            return True
    return False
