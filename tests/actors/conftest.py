"""Private Rays, each in a folder of its own whose path is short: Ray's sockets lie below it."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def short_ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the test's Ray a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="pr-") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        yield


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Start one Ray for all tests of a file."""
    from ppo_ray.actors.session import ray_session
    from ppo_ray.config import RayConfig

    with tempfile.TemporaryDirectory(prefix="pr-") as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", short)
        with ray_session(RayConfig(object_store_mib=128)):
            yield
