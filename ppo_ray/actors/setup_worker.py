"""What a private Ray runs first in a worker's process: it sets the environment, and becomes the worker.

Ray's own script of this name imports all of Ray for that, half a second of each worker's start; this one imports
nothing but Python's standard library. Ray runs it as a file, not as a module of this package.
"""

import json
import os
import sys

_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
OF_RAY = "PPO_RAY_SETUP_WORKER"
"""The environment variable that names Ray's own script."""
PLAIN: dict[str, object] = {
    "command_prefix": [],
    "py_executable": sys.executable,
    "override_worker_entrypoint": None,
    "java_jars": [],
}
"""What a context holds beside its variables if it asks for nothing else."""


def main(arguments: list[str]) -> None:
    """Replace this process by the worker's; what is more than environment variables is left to Ray's own script.

    Args:
        arguments: of the command line: Ray's context of the runtime environment, the language, the worker's script
            and its own arguments.
    """
    context = json.loads(next((item[len(_CONTEXT) :] for item in arguments if item.startswith(_CONTEXT)), "{}"))
    variables = context.pop("env_vars", {})
    special = {key: value for key, value in context.items() if value != PLAIN.get(key)}
    if special or any("$" in value for value in variables.values()):
        os.execv(sys.executable, [sys.executable, os.environ[OF_RAY], *arguments])
    os.environ.update(variables)
    own = [item for item in arguments if not item.startswith((_CONTEXT, _LANGUAGE))]
    os.execv(sys.executable, [sys.executable, *own])


if __name__ == "__main__":
    main(sys.argv[1:])
