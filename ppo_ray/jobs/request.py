"""The request to run a config as a job, and the checks of it that need no cluster."""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from ppo_ray.config import Config, is_loopback
from ppo_ray.preflight import output_problems

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_DATA_FILES = (".parquet", ".csv", ".jsonl")
_LEFT_OUT = ".gitignore, .rayignore and Ray itself (.git, .venv, venv, __pycache__) leave files out"


@dataclass(frozen=True)
class JobRequest:
    """The job that `ppo-ray submit` is asked for."""

    config: Config
    """Of the run, as it is to be on the cluster."""
    address: str
    """URL of the dashboard."""
    name: str
    """Of the job; the cluster must not have had one of that name."""
    working_dir: Path | None = None
    """A folder that is sent: the job's working directory. None: only the config is sent."""
    variables: tuple[str, ...] = ()
    """Names of the environment variables that go with the job."""


def make_job_name(config: Path) -> str:
    """Return a name that no other job has, e.g. `films-20260102-030405-6f0c` for films.yaml."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.stem).strip("-._")[:60] or "job"
    return f"{stem}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def head_problems(request: JobRequest, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield why the head of the cluster cannot be asked for anything: a wrong address, or no token.

    A token is looked for where Ray does; Ray alone reads it, and no message holds it.
    """
    if not request.address.startswith(("http://", "https://")):
        yield f"--address={request.address}: give the URL of the head's dashboard, e.g. http://HOST:8265"
    if environment.get("RAY_AUTH_MODE") == "disabled" or environment.get("RAY_ENABLE_K8S_TOKEN_AUTH"):
        return
    if environment.get("RAY_AUTH_TOKEN"):
        return
    given = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given or Path(environment.get("HOME", "~"), ".ray", "auth_token")).expanduser()
    if not path.is_file() or not path.stat().st_size:
        yield (
            f"no token for the cluster: RAY_AUTH_TOKEN is not set, and {path} is not there or empty; export the token "
            "that the head was started with (a cluster without tokens: RAY_AUTH_MODE=disabled)"
        )


def describe_exposure(address: str) -> str | None:
    """Return a warning where the cluster's token crosses a network in clear; None where it does not."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme != "http" or is_loopback(host):
        return None
    return (
        f"warning: {address} is not encrypted: the cluster's token, and what is sent, can be read on the way. On a "
        f"network that others share use https, or a tunnel: ssh -L 8265:127.0.0.1:{parts.port or 80} {host}"
    )


def describe_unsent_tokens(request: JobRequest) -> Iterator[str]:
    """Yield a warning for each reward server's token that does not go with the job; the cluster may have it."""
    for key, source in request.config.reward.sources:
        if source.token_env is not None and source.token_env not in request.variables:
            yield (
                f"warning: {key}.token_env={source.token_env} is not among --env: the job finds it only where the "
                f"cluster's nodes set it themselves; to send it: --env {source.token_env}"
            )


def request_problems(
    request: JobRequest, environment: Mapping[str, str], holds: Callable[[str], bool]
) -> Iterator[str]:
    """Yield what is wrong with the job itself.

    Args:
        request: what was asked for.
        environment: variables of this process.
        holds: says whether a path, relative to the working dir, is sent.
    """
    if not _NAME.fullmatch(request.name):
        yield f"--name={request.name}: may hold letters, digits, `.`, `_` and `-`, 100 at most"
    yield from _variable_problems(request.variables, environment)
    yield from _config_problems(request.config)
    for key, path in _paths(request.config).items():
        yield from _path_problems(key, path, request.working_dir, holds)
    for key, source in request.config.reward.sources:
        if source.function is not None:
            yield from _module_problems(f"{key}.function", source.function, request.working_dir, holds)
    if (ppo := request.config.ppo).own_policy_loss:
        yield from _module_problems("ppo.policy_loss", ppo.policy_loss, request.working_dir, holds)


def _variable_problems(names: tuple[str, ...], environment: Mapping[str, str]) -> Iterator[str]:
    for name in names:
        if not _VARIABLE.fullmatch(name):
            shown = name.partition("=")[0]  # what follows may be a secret
            yield f"--env {shown}: give the name alone; its value is taken from here, and need not be typed"
        elif name.startswith("RAY_"):
            yield f"--env {name}: is the cluster's own to set; leave it out"
        elif name not in environment:
            yield f"--env {name}: is not set here; export it, or leave it out"


def _config_problems(config: Config) -> Iterator[str]:
    yield from output_problems(config)
    if config.ray.address not in (None, "auto"):
        yield f"ray.address={config.ray.address}: a job runs on the cluster it was submitted to; leave it out"


def _paths(config: Config) -> dict[str, str]:
    found = {
        "model.path": config.model.path,
        "model.reference_path": config.model.reference_path,
        "model.critic_path": config.model.critic_path,
        **{f"{key}.path": part.path for key, part in config.prompts.parts},
        **{f"evaluation.sets.{name}.path": found.path for name, found in config.evaluation.sets.items()},
        **{f"{key}.path": source.path for key, source in config.reward.sources},
    }
    for key, source in config.reward.sources:
        if source.judge is not None:
            found |= {f"{key}.judge.path": source.judge.path, f"{key}.judge.prompt": source.judge.prompt}
        if source.chat_template not in ("tokenizer", "none"):
            found[f"{key}.chat_template"] = source.chat_template
    if config.prompts.chat_template not in ("auto", "tokenizer", "none"):
        found["prompts.chat_template"] = config.prompts.chat_template
    return {key: path for key, path in found.items() if path is not None}


def _path_problems(key: str, path: str, working_dir: Path | None, holds: Callable[[str], bool]) -> Iterator[str]:
    """Yield the problem of a path as the job sees it, from its working directory.

    Absolute paths and names on the hub are for the cluster to find.
    """
    if Path(path).is_absolute() or not _is_local(path, working_dir):
        return
    if working_dir is None:
        yield (
            f"{key}={path}: is relative, and no folder is sent that it could lie in; give an absolute path that the "
            "cluster's nodes have, or send a folder with --working-dir"
        )
    elif not (working_dir / path).exists():
        yield f"{key}={path}: is not in --working-dir={working_dir}, where the job looks for it"
    elif not holds(path):
        yield f"{key}={path}: is not among the files that are sent of --working-dir={working_dir}: {_LEFT_OUT}"


def _is_local(path: str, working_dir: Path | None) -> bool:
    """Say whether what is not absolute is a relative path, rather than a name on the hub."""
    looks = path.startswith(".") or path.count("/") > 1 or Path(path).suffix in _DATA_FILES
    return looks or Path(path).exists() or (working_dir is not None and (working_dir / path).exists())


def _module_problems(key: str, function: str, working_dir: Path | None, holds: Callable[[str], bool]) -> Iterator[str]:
    """Yield the problem of a module that lies here and is not sent; an installed one is for the cluster to have."""
    package = function.partition(":")[0].partition(".")[0]
    names = (package, f"{package}.py")
    if _is_installed(package):
        return
    if working_dir is not None and any((working_dir / name).exists() for name in names):
        if not any(map(holds, names)):
            yield f"{key}={function}: {package} is not sent with --working-dir={working_dir}: {_LEFT_OUT}"
    elif any(Path(name).exists() for name in names):
        yield f"{key}={function}: {package} lies here and is not sent; send its folder: --working-dir ."


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    return any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places if place)
