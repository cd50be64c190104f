"""One process with vLLM for most tests of this folder, another for models that it cannot serve beside others."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_ray.rollout.engine import Engine
from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, ENVIRONMENT
from tests.rollout.comparison import DistantVLLM, start_beside_others


@pytest.fixture(scope="session")
def vllm_engine(tiny_policy: Path) -> Iterator[Engine]:
    os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT)  # read when vllm is imported, just below
    engine = start_beside_others(tiny_policy)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def distant_vllm() -> Iterator[DistantVLLM]:
    distant = DistantVLLM()
    yield distant
    distant.close()
