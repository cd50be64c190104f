"""Whose Ray is used, and what is left of it."""

import socket
import subprocess

import psutil
import pytest
import ray

from ppo_ray.actors import session
from ppo_ray.actors.session import ray_session
from ppo_ray.config import RayConfig
from ppo_ray.errors import InputError, WorkerError

pytestmark = pytest.mark.slow


@ray.remote
def answer() -> int:
    return 42


def test_a_private_ray_is_there_for_whoever_is_in_it_and_leaves_no_process(short_ray_folder: None) -> None:
    before = set(psutil.Process().children(recursive=True))
    with ray_session(RayConfig(object_store_mib=100)):
        with ray_session(RayConfig(object_store_mib=100, address="1.2.3.4:5")):  # the caller's own is used and left
            assert ray.get(answer.remote(), timeout=60) == 42
        assert ray.get(answer.remote(), timeout=60) == 42
        assert set(psutil.Process().children(recursive=True)) - before
    assert not ray.is_initialized()
    assert not [process for process in set(psutil.Process().children(recursive=True)) - before if process.is_running()]


def test_a_ray_that_does_not_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
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
