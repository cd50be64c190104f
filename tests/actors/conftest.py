"""One private Ray for all tests of this folder."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def session() -> Iterator[None]:
    from ppo_ray.actors.session import ray_session
    from ppo_ray.config import RayConfig

    with tempfile.TemporaryDirectory(prefix="pr-") as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", short)
        with ray_session(RayConfig(object_store_mib=128)):
            yield
