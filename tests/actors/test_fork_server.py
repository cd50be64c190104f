"""Workers that are forked off a process which has imported what they need."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ppo_ray.actors import setup_worker
from ppo_ray.actors.fork_server import MODULES, fork_server
from ppo_ray.actors.setup_worker import FORK, FORK_SERVER, SIZE_BYTES
from ppo_ray.plan.demand import CPU_ENVIRONMENT, FORK_VARIABLE

REPORT = """
import json, os, resource, sys
print(json.dumps({
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "oom_score": open("/proc/self/oom_score_adj").read(),
    "name": __name__, "arguments": sys.argv, "folder": os.getcwd(), "path": sys.path[0],
    "has_module": "colorsys" in sys.modules, "A": os.environ.get("A"), "B": os.environ.get("B"),
    "inherited": [name for name in os.environ if name.startswith("PPO_RAY_FORK_") or name == "PPO_RAY_FORK"],
    "threads": os.environ["OMP_NUM_THREADS"], "parent": os.getppid(), "leads_group": os.getpgrp() == os.getpid(),
}))
print("to standard error", file=sys.stderr)
sys.exit(3)
"""
LIMIT_S = 30


def start(script: Path, variables: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a worker as Ray does, whose script is a file."""
    variables = {"OMP_NUM_THREADS": "2", **variables}
    context = "--serialized-runtime-env-context=" + json.dumps({"env_vars": variables, **setup_worker.PLAIN})
    command = [sys.executable, setup_worker.__file__, context, "--language=PYTHON", "-u", str(script), "--of=ray"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(folder: Path, variables: dict[str, str], **options: Any) -> dict[str, Any]:
    """Let a worker report what it finds."""
    script = folder / "report.py"
    script.write_text(REPORT)
    place = folder / "place"
    place.mkdir(exist_ok=True)
    out, err = start(script, variables, cwd=place, **options).communicate(timeout=LIMIT_S)
    assert err == "to standard error\n"
    found: dict[str, Any] = json.loads(out)
    assert found["name"] == "__main__"
    assert not found["inherited"]
    assert found["arguments"] == [str(script), "--of=ray"]
    assert (found["folder"], found["path"]) == (str(place), str(folder))
    assert (found["A"], found["threads"]) == (variables.get("A"), "2")
    return found


def wait_for_end(*processes: int) -> bool:
    """Say whether all end within the limit."""
    ends = time.monotonic() + LIMIT_S
    while any(map(psutil.pid_exists, processes)) and time.monotonic() < ends:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, processes))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_forked_worker_is_as_python_would_have_started_it_with_the_modules_there(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("B", "of the driver")
    with fork_server(at_once, ["colorsys"]):
        found = run(tmp_path, {FORK: "1", "A": "of the actor"})
        again = run(tmp_path, {FORK: "1"})  # which has nothing of the first
    assert found["has_module"]
    assert (found["B"], again["B"], again["A"]) == ("of the driver", "of the driver", None)
    assert found["parent"] == again["parent"]
    assert found["leads_group"]  # with which Ray kills it
    assert wait_for_end(found["parent"])
    assert FORK_SERVER not in os.environ


def test_a_forked_worker_has_the_limits_that_ray_gave_to_its_process(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (321, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        Path("/proc/self/oom_score_adj").write_text("987")

    with fork_server(modules=["colorsys"]):
        found = run(tmp_path, {FORK: "1"}, preexec_fn=limit)
    assert found["has_module"]
    assert (found["open_files"], found["oom_score"]) == (321, "987\n")


def test_nothing_is_forked_for_who_was_killed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import colorsys, time\ntime.sleep(2)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    script = tmp_path / "too_late.py"
    script.write_text(f"open({str(tmp_path / 'forked')!r}, 'w')")
    with fork_server(modules=["slow_module"]):
        process = start(script, {FORK: "1"})
        time.sleep(1)
        process.kill()
        process.communicate()
        assert run(tmp_path, {FORK: "1"})["has_module"]
    assert not (tmp_path / "forked").exists()


def test_where_no_socket_can_be_the_workers_start_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ("long" * 30)
    place.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.setenv(FORK_SERVER, "/tmp/ppo-ray-fork-1-abc/socket")
    with fork_server(modules=["colorsys"]):
        assert FORK_SERVER not in os.environ
        assert not run(tmp_path, {FORK: "1"})["has_module"]
    assert os.environ[FORK_SERVER] == "/tmp/ppo-ray-fork-1-abc/socket"
    assert not list(place.iterdir())


def test_a_request_that_breaks_off_costs_the_server_nothing(tmp_path: Path) -> None:
    with fork_server(modules=["colorsys"]):
        for content in (b"", (100).to_bytes(SIZE_BYTES) + b"{"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(os.environ[FORK_SERVER])
                connection.sendall(content)
        assert run(tmp_path, {FORK: "1"})["has_module"]


def test_a_server_of_another_process_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORK_SERVER, "/tmp/ppo-ray-fork-1-abc/socket")
    with fork_server(modules=[]):
        outer = os.environ[FORK_SERVER]
        assert Path(outer).is_socket()
        with fork_server(modules=[]):
            assert os.environ[FORK_SERVER] == outer
        assert Path(outer).is_socket()
    assert os.environ[FORK_SERVER] == "/tmp/ppo-ray-fork-1-abc/socket"
    assert not Path(outer).exists()


def test_a_worker_that_may_not_be_forked_is_not(tmp_path: Path) -> None:
    with fork_server(modules=["colorsys"]):
        assert not run(tmp_path, {})["has_module"]


def test_without_a_server_a_worker_starts_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run(tmp_path, {FORK: "1"})["has_module"]
    monkeypatch.setenv(FORK_SERVER, str(tmp_path / "gone"))
    assert not run(tmp_path, {FORK: "1"})["has_module"]


def test_a_server_with_a_second_thread_forks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "import colorsys, threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
    (tmp_path / "with_thread.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with fork_server(modules=["with_thread"]):
        assert not run(tmp_path, {FORK: "1"})["has_module"]
        ends = time.monotonic() + LIMIT_S
        with pytest.raises(OSError):  # it ends: nobody waits for it in vain
            while time.monotonic() < ends:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(os.environ[FORK_SERVER])
                time.sleep(0.05)


def test_the_end_of_a_server_is_that_of_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    with fork_server(modules=[]):
        setup = start(script, {FORK: "1"})
        assert setup.stdout is not None
        worker = int(setup.stdout.readline())
        assert worker != setup.pid
        assert setup.poll() is None  # it lives as long as the worker
    assert wait_for_end(worker)
    assert setup.wait(LIMIT_S) == 0


def test_a_driver_that_is_killed_leaves_neither_server_nor_workers(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, time\nfrom pathlib import Path\nfrom ppo_ray.actors.fork_server import fork_server\n"
        "from tests.actors.test_fork_server import FORK, FORK_SERVER, start\n"
        "with fork_server(modules=[]):\n"
        f"    worker = start(Path({str(tmp_path / 'worker.py')!r}), {{FORK: '1'}})\n"
        "    print(worker.stdout.readline().strip(), os.environ[FORK_SERVER], flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(driver)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    worker, place = process.stdout.readline().split()
    server = psutil.Process(int(worker)).ppid()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert wait_for_end(int(worker), server)
    assert not Path(place).parent.exists()


def test_what_is_imported_starts_no_thread_and_no_ray() -> None:
    code = f"import os, sys\nfrom ppo_ray.actors.fork_server import import_ahead\nimport_ahead(*{MODULES})\n"
    code += "print(len(os.listdir('/proc/self/task')), 'ray' in sys.modules, 'torch' in sys.modules)"
    environment = {**os.environ, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "False", "True"]


def test_actors_and_rays_script_call_the_variable_the_same() -> None:
    assert FORK == FORK_VARIABLE
