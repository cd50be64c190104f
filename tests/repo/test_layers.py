"""The map of the package: which room imports which, and where heavy libraries may be imported.

`ROOMS` and `HOMES` are the only list of this; CONTRIBUTING.md shows the same table, which a test compares.
"""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ppo_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS = {
    "__main__ cli": "the commands",
    "jobs view": "a run as a job on a Ray cluster: what is sent, and how it is followed; runs in the browser",
    "run trl": "the loop, what stands around it and what it writes; TRL's classes over the same parts",
    "preflight": "what is found wrong before anything starts",
    "learner rollout": "one PPO update; generation",
    "reward weights": "scoring; weights on their way from the learner to the engines",
    "actors": "any actor, whatever it does: groups, waiting, shards, placement, the Ray session",
    "models plan prompts": "networks and packed rows; where actors go and the memory they need; the prompt stream",
    "config": "every option; loads neither torch nor Ray",
    "assets checkpoint stopping": "the demo's models and data; a checkpoint's format; signals",
    "algo atomic errors events machine seeding trajectory": "pure functions of tensors; files written whole or not at "
    "all; words that everybody speaks; CPUs and memory to use; a step's table",
}
"""Rooms and loose modules, a floor per row: each imports only what is on lower floors, and itself."""

HOMES = {
    "ray": "actors/*  jobs/*  */actor.py  */group.py  weights/transports.py  run/actors.py  run/gauges.py",
    "vllm": "rollout/vllm*.py  weights/nccl_sender.py",
    "torch": "algo/*  models/*  learner/*  rollout/*  reward/classifier.py  reward/batching.py  weights/*  plan/*  "
    "assets/*  trl/*",
    "peft": "models/lora.py  models/adapter_files.py  trl/modeling.py",
    "bitsandbytes": "models/quantization.py",
    "matplotlib": "run/curves.py  run/report.py",
    "tensorboard": "run/log.py",
    "datasets": "prompts/sources.py  assets/*",
    "typer": "cli.py  run/commands.py",
    "requests": "jobs/server.py  reward/http.py",
    "fastapi": "reward/serve.py  view/server.py",
    "uvicorn": "reward/serve.py  view/server.py",
    "omegaconf": "config/file.py",
    "wandb": "run/trackers.py  trl/statistics.py",
    "mlflow": "run/trackers.py",
    "trackio": "run/trackers.py",
    "swanlab": "run/trackers.py",
}
"""The files that may import a library, even inside a function."""

FLOOR = {name: number for number, names in enumerate(reversed(ROOMS)) for name in names.split()}


def path_of(file):
    return file.relative_to(PACKAGE).as_posix()


def room(name):
    """Return the room or loose module of a dotted name such as `ppo_ray.learner.batch`."""
    return name.split(".")[1]


def module(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def imports(file):
    """Return every absolute module name that a file imports, anywhere in it; of ours the innermost module."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in inner}
    return found - {module(file), "ppo_ray"}


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_imports_point_down(file):
    if path_of(file) == "__init__.py":  # the public face, which imports on demand
        return
    here = room(module(file))
    for name in imports(file):
        if name.startswith("ppo_ray.") and room(name) != here:
            assert FLOOR[room(name)] < FLOOR[here] or here == "__main__", f"{path_of(file)} imports {name}"


def test_no_modules_import_one_another_in_a_circle():
    TopologicalSorter({name: imports(file) & MODULES.keys() for name, file in MODULES.items()}).prepare()


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_at_home(library):
    users = [path_of(file) for file in FILES if library in {name.split(".")[0] for name in imports(file)}]
    assert [user for user in users if not any(fnmatch(user, home) for home in HOMES[library].split())] == []
    assert users


def test_algo_imports_torch_and_itself_alone():
    files = list(PACKAGE.glob("algo/*.py"))
    assert files
    for file in files:
        for name in imports(file):
            package = name.split(".")[0]
            assert package in sys.stdlib_module_names | {"torch"} or name.startswith("ppo_ray.algo"), (file, name)


def test_contributing_shows_this_map():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [f"| {', '.join(f'`{name}`' for name in names.split())} | {meaning} |" for names, meaning in ROOMS.items()]
    assert "\n".join(["| rooms | |", "|---|---|", *rows]) in text
    homes = [f"| {library} | {', '.join(f'`{home}`' for home in homes.split())} |" for library, homes in HOMES.items()]
    assert "\n".join(["| library | imported in |", "|---|---|", *homes]) in text


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        ("cli run.commands", "torch ray transformers vllm pyarrow datasets pydantic"),
        ("config seeding plan", "torch ray transformers vllm pyarrow datasets numpy"),
        ("run.log run.folder run.follow run.trackers", "torch ray transformers vllm pyarrow datasets"),
        ("prompts.stream", "torch ray transformers vllm datasets"),
        ("rollout.group reward.group learner.group", "torch transformers vllm datasets"),
        ("run.summary run.curves run.show", "torch transformers vllm datasets matplotlib"),
        ("learner.learner rollout.hf weights.nccl_sender", "ray vllm"),
    ],
)
def test_light_modules_load_nothing_heavy(names, heavy):
    """In a process of their own, so that what other tests have loaded does not count."""
    probe = (
        f"import importlib, sys\nfor name in {names.split()}:\n    importlib.import_module('ppo_ray.' + name)\n"
        f"    print(*[f'{{name}} loads {{heavy}}' for heavy in {heavy.split()} if heavy in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_metrics_are_written_without_torch_or_ray(tmp_path):
    probe = (
        "import sys, pathlib; from ppo_ray.run.log import MetricsLog; log = MetricsLog(pathlib.Path(sys.argv[1]));"
        "log.write(0, {'a': 1.0}); log.close(); print('torch' in sys.modules or 'ray' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", probe, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
