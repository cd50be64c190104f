"""What a private Ray runs first in a worker's process."""

import json
import os
import sys
from pathlib import Path

import pytest
from ray._private.parameter import RayParams
from ray._private.runtime_env.context import RuntimeEnvContext

from ppo_ray.actors import setup_worker

WORKER = ["-s", "/ray/default_worker.py", "--node-id=1"]


def run(monkeypatch: pytest.MonkeyPatch, context: RuntimeEnvContext | None) -> tuple[list[str], list[str]]:
    """Return the arguments that the script was given, and those of the process that it becomes."""
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: became.append(arguments) or sys.exit())
    monkeypatch.setenv(setup_worker.OF_RAY, "/ray/setup_worker.py")
    given = [] if context is None else [f"--serialized-runtime-env-context={context.serialize()}"]
    arguments = [*given, "--language=PYTHON", *WORKER]
    with pytest.raises(SystemExit):
        setup_worker.main(arguments)
    return arguments, became[0]


def test_a_worker_gets_its_variables_and_none_of_the_flags_that_are_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _, became = run(monkeypatch, RuntimeEnvContext(env_vars={"OMP_NUM_THREADS": "2"}))
    assert became == [sys.executable, *WORKER]
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_worker_without_an_environment_of_its_own_starts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, None)[1] == [sys.executable, *WORKER]


@pytest.mark.parametrize(
    "context",
    [
        RuntimeEnvContext(command_prefix=["cd /work &&"]),
        RuntimeEnvContext(py_executable="uv run python"),
        RuntimeEnvContext(override_worker_entrypoint="/other.py"),
        RuntimeEnvContext(env_vars={"PATH": "/bin:${PATH}"}),
    ],
)
def test_what_is_more_than_plain_variables_is_left_to_rays_own_script(
    monkeypatch: pytest.MonkeyPatch, context: RuntimeEnvContext
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments, became = run(monkeypatch, context)
    assert became == [sys.executable, "/ray/setup_worker.py", *arguments]


def test_rays_script_has_the_name_and_the_context_that_ours_takes_for_granted() -> None:
    import ray._private.node
    from ray._private.ray_constants import SETUP_WORKER_FILENAME

    assert Path(setup_worker.__file__).name == SETUP_WORKER_FILENAME  # the raylet looks for it
    assert (Path(ray._private.node.__file__).parent / "workers" / SETUP_WORKER_FILENAME).is_file()
    plain = json.loads(RuntimeEnvContext(env_vars={"A": "b"}).serialize())
    assert plain == {"env_vars": {"A": "b"}, **setup_worker.PLAIN}
    RayParams().update(no_monitor=True, include_log_monitor=False, setup_worker_path="")  # raises if one is unknown
