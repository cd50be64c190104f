"""Imports point down the list; heavy libraries stay in their own corner."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ppo_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    ("__main__",),
    ("cli",),
    ("driver", "trl", "submission"),
    ("loop", "held_out", "capacity"),
    ("actors",),
    ("learner", "engines"),
    ("diagnostics", "learner_state", "weight_probe", "job_request"),
    ("minibatch", "optimizer", "learner_models"),
    ("objective",),
    ("experience",),
    ("batch", "sharding"),
    ("master_weights",),
    ("models",),
    ("weights", "trajectory", "staleness", "report", "preflight", "resume"),
    ("evaluation", "run_folder", "prompts", "reward_function", "labels", "plan"),
    ("prompt_source", "checkpoint"),
    ("algo",),
    ("config",),
    ("assets",),
    ("metrics", "seeding", "ranks"),
    ("agreement", "allocation", "atomic", "events", "stopping"),
    ("errors",),
]
"""Top modules; one imports only those of lower rows (and its own package)."""

RANK = {name: len(LAYERS) - row for row, names in enumerate(LAYERS) for name in names}

HOMES = {
    "ray": ("actors/",),
    "vllm": ("engines/vllm",),
    "matplotlib": ("report/curves.py",),
    "tensorboard": ("metrics.py",),
    "datasets": ("prompt_source.py", "assets/"),
    "typer": ("cli.py",),
    "omegaconf": ("config/file.py",),
}
"""Where a library may be imported, even inside a function."""


def imports(file):
    """Every absolute module name that a file imports, anywhere in it, with the names taken from it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from ppo_ray import driver` imports ppo_ray.driver
            yield from (f"ppo_ray.{alias.name}" for alias in node.names) if node.module == "ppo_ray" else [node.module]


def ours(file):
    return file.relative_to(PACKAGE).as_posix()


def top(file):
    return ours(file).split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=ours)
def test_imports_point_down(file):
    if ours(file) == "__init__.py":
        return
    for name in imports(file):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "ppo_ray" or other in (top(file), "__version__"):
            continue
        assert RANK[other] < RANK[top(file)], f"{ours(file)} imports {name}, which stands above or beside it"


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_at_home(library):
    users = [ours(file) for file in FILES if library in {name.split(".")[0] for name in imports(file)}]
    assert all(user.startswith(HOMES[library]) for user in users), users
    assert users


def test_algo_imports_torch_and_itself_alone():
    files = [file for file in FILES if top(file) == "algo"]
    assert files
    for file in files:
        for name in imports(file):
            package = name.split(".")[0]
            assert package in sys.stdlib_module_names or package == "torch" or name.startswith("ppo_ray.algo"), (
                file,
                name,
            )


def test_files_are_short():
    lengths = {ours(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("config", "torch ray transformers vllm pyarrow datasets numpy"),
        ("seeding", "torch ray transformers vllm pyarrow datasets numpy"),
        ("metrics", "torch ray transformers vllm pyarrow datasets"),
        ("prompts", "torch ray transformers vllm datasets"),
        ("run_folder", "torch ray transformers vllm pyarrow datasets"),
        ("report", "torch ray transformers vllm pyarrow datasets matplotlib"),
        ("plan", "torch ray transformers vllm pyarrow datasets numpy"),
        ("cli", "torch ray transformers vllm pyarrow datasets pydantic"),
        ("actors.rollout", "torch transformers vllm datasets"),
        ("learner", "ray vllm"),
        ("engines.hf", "ray vllm"),
        ("engines.vllm_sender", "ray vllm"),
    ],
)
def test_light_modules_load_nothing_heavy(module, heavy):
    """In a process of its own, so that what other tests have loaded does not count."""
    probe = f"import sys, ppo_ray.{module}; print(*[name for name in {heavy.split()} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_metrics_writes_without_torch_or_ray(tmp_path):
    probe = (
        "import sys, pathlib; from ppo_ray.metrics import MetricsLog; log = MetricsLog(pathlib.Path(sys.argv[1]));"
        "log.write(0, {'a': 1.0}); log.close(); print('torch' in sys.modules or 'ray' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", probe, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
