"""What a private Ray runs first in a worker's process: it sets the environment, and becomes the worker.

Ray's own script of this name imports all of Ray for that, half a second of each worker's start; this one imports
nothing but Python's standard library. Ray runs it as a file, not as a module of this package.

Where the worker may be forked, this process asks the fork server for it (`fork_server.py`) and waits for its end.
"""

import json
import os
import sys

_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
OF_RAY = "PPO_RAY_SETUP_WORKER"
"""The environment variable that names Ray's own script."""
FORK_SERVER = "PPO_RAY_FORK_SERVER"
"""The environment variable that names the fork server's socket."""
FORK = "PPO_RAY_FORK"
"""The environment variable of workers that may be forked."""
OOM_SCORE = "/proc/self/oom_score_adj"
"""The file by which Ray lets the kernel kill workers before anything else if memory runs out."""
SIZE_BYTES = 8
"""Of the number before a request to the server: the size of its JSON."""
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
    server, may_be_forked = os.environ.pop(FORK_SERVER, None), os.environ.pop(FORK, None)
    if server and may_be_forked and was_forked(server, own):
        return
    os.execv(sys.executable, [sys.executable, *own])


def was_forked(server: str, arguments: list[str]) -> bool:
    """Let the server fork this worker, and wait for its end.

    It gets this process's environment, folder, files and limits, which are what Ray gave to the worker.

    Args:
        server: path of the server's socket.
        arguments: the worker's script and its own arguments; Python's options before them have no effect.

    Returns:
        Whether it did; not if there is no server, or it cannot fork.
    """
    import contextlib
    import resource
    import socket

    script = next(place for place, item in enumerate(arguments) if not item.startswith("-"))
    request: dict[str, object] = {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "arguments": arguments[script:],
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }
    forked = False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        with open(OOM_SCORE, encoding="ascii") as file:
            content = json.dumps({**request, "oom_score": file.read()}).encode()
        connection.connect(server)
        socket.send_fds(connection, [len(content).to_bytes(SIZE_BYTES)], [0, 1, 2])
        connection.sendall(content)
        forked = connection.recv(1) == b"+"
        if forked:
            connection.recv(1)  # the worker holds the other end
    return forked


if __name__ == "__main__":
    main(sys.argv[1:])
