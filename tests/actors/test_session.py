"""Whose Ray is used, who can get at it, and what is left of it."""

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import xxhash

from ppo_ray.actors import session
from ppo_ray.actors.session import ray_session
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import RayConfig
from ppo_ray.errors import InputError, WorkerError
from ppo_ray.plan import ActorSpec

pytestmark = pytest.mark.slow


@ray.remote
def answer() -> int:
    return 42


class Looker(Worker):
    """Tells where it is and which library it has."""

    def look(self) -> tuple[str, str, str | None]:
        import xxhash

        return os.getcwd(), xxhash.__file__, os.environ.get("NCCL_SOCKET_IFNAME")


_CLIENT = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print('CONNECTED')"


def test_a_private_ray_is_closed_to_others_and_leaves_nothing(
    short_ray_folder: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither a shell that turns authentication off, nor a current folder with files named like libraries, matters."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-clusters")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xxhash.py").write_text("raise SystemExit('a stranger's file')")
    before = set(psutil.Process().children(recursive=True))
    with ray_session(RayConfig(object_store_mib=100)):
        assert (os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])) == ("token", 64)
        folders = sorted(Path(os.environ["RAY_TMPDIR"]).iterdir(), key=lambda folder: "-fork-" in folder.name)
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 2
        folder, _ = folders  # Ray's, and the fork server's
        assert list(folder.glob("r/session_*/sockets/*"))
        with ray_session(RayConfig(object_store_mib=100, address="1.2.3.4:5")):  # the caller's own is used and left
            assert ray.get(answer.remote(), timeout=60) == 42
        assert ray.get(answer.remote(), timeout=60) == 42
        worker = (
            ray.remote(concurrency_groups=CONTROL)(Looker)
            .options(**ActorSpec("reward", 1, 1, 0).options("reward-0"))
            .remote("reward-0")
        )
        assert ray.get(worker.look.remote(), timeout=60) == (str(tmp_path), xxhash.__file__, "=lo")
        started = set(psutil.Process().children(recursive=True)) - before
        commands = " ".join(part for process in started for part in process.cmdline()[:4])
        assert "raylet" in commands
        assert not re.search(r"monitor\.py|log_monitor|dashboard\.py", commands)  # no run needs them
        address = ray.get_runtime_context().gcs_address
        stranger = subprocess.run(
            [sys.executable, "-c", _CLIENT, address],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert stranger.returncode != 0 and "CONNECTED" not in stranger.stdout
    assert not ray.is_initialized()
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("disabled", "the-clusters")
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    assert not [process for process in set(psutil.Process().children(recursive=True)) - before if process.is_running()]
    assert list(Path(os.environ["RAY_TMPDIR"]).iterdir()) == []


def test_a_ray_that_does_not_start_leaves_no_process(short_ray_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        subprocess.Popen(["sleep", "1000"])
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(session, "_EXIT_S", 0.5)
    before = psutil.Process().children()
    with pytest.raises(WorkerError, match="did not start on this machine: The current node"), ray_session(RayConfig()):
        raise AssertionError
    assert [process for process in psutil.Process().children() if process not in before] == []


@pytest.mark.timeout(60)  # Ray itself would try for minutes
def test_an_address_where_nobody_listens_is_refused_at_once(short_ray_folder: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    refused = pytest.raises(InputError, match=f"ray.address='{address}': no Ray cluster answers there")
    with refused, ray_session(RayConfig(address=address)):
        raise AssertionError
    assert not ray.is_initialized()


def test_an_error_leaves_the_logs_that_it_names_to_this_account_alone(short_ray_folder: None) -> None:
    with pytest.raises(WorkerError), ray_session(RayConfig(object_store_mib=100)):
        raise WorkerError("rollout-0 failed, log ...")
    (folder,) = Path(os.environ["RAY_TMPDIR"]).iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.glob("r/session_*/logs/raylet.out"))
    with pytest.raises(InputError), ray_session(RayConfig(object_store_mib=100)):  # also: a second Ray, a second token
        assert ray.get(answer.remote(), timeout=60) == 42
        raise InputError("no room")
    assert list(Path(os.environ["RAY_TMPDIR"]).iterdir()) == [folder]
