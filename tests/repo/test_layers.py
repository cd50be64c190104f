"""The map of the package: which room may import which, and where heavy libraries may be imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ppo_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS = [
    ("cli", "__main__", "__init__"),
    ("run", "trl", "jobs"),
    ("learner", "rollout", "preflight"),
    ("reward", "weights"),
    ("actors",),
    ("models", "prompts", "plan"),
    ("config",),
    ("assets", "checkpoint", "stopping"),
    ("algo", "trajectory", "seeding"),
    ("atomic", "events"),
    ("errors",),
]
"""Rooms and loose modules, a floor a row: a room imports only what is on lower floors, and itself."""

SAME_FLOOR = {"cli": {"__init__"}, "__main__": {"cli"}, "jobs": set(), "run": set()}
"""Exceptions: neighbours on a floor that a room may import."""

HOMES = {
    "ray": "actors/* jobs/* */actor.py */group.py weights/transports/* run/actors.py run/gauges.py",
    "vllm": "rollout/vllm*.py weights/nccl_sender.py",
    "torch": "algo/* models/* learner/* rollout/* reward/classifier.py weights/* trl/* assets/*",
    "matplotlib": "run/curves.py",
    "tensorboard": "run/log.py",
    "datasets": "prompts/texts.py assets/*",
    "typer": "cli.py",
    "omegaconf": "config/file.py",
}
"""Patterns of the files that may import a library, even inside a function."""

HEADINGS = {
    "ray": "",
}


def imports(file):
    """Every absolute module name that a file imports, anywhere in it, with the names taken from it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from ppo_ray.run import train` imports ppo_ray.run.train
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) or node.module == "ppo_ray" else node.module


def is_module(name):
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
