"""Whole runs as a user starts them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, tiny_command_line


@pytest.fixture
def ppo_ray(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path: Path) -> Iterator[CommandLine]:
    with tiny_command_line(tiny_policy, tiny_classifier, tiny_prompts, tmp_path) as command_line:
        yield command_line
