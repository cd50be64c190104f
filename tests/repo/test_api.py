"""The public names of `ppo_ray`, and the programs of docs/api.md as they stand there."""

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_ray

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
TABLE = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
FILES = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
PROGRAMS = {
    heading: next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import" in block)
    for heading, text in SECTIONS.items()
}


@pytest.fixture
def folder(
    tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the folder that the page describes; it is the current one."""
    for name, target in (("policy", tiny_policy), ("classifier", tiny_classifier), ("prompts.parquet", tiny_prompts)):
        (tmp_path / name).symlink_to(target)
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(heading: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a program in this process; returns the lines that it printed."""
    path = Path("program.py")
    path.write_text(PROGRAMS[heading])
    capsys.readouterr()
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def run_alone(heading: str) -> list[str]:
    """Run a program in a process of its own; returns the lines that it printed."""
    Path("program.py").write_text(PROGRAMS[heading])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "program.py"], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_an_import_loads_nothing_heavy() -> None:
    heavy = "torch ray transformers vllm pydantic pyarrow numpy yaml rich typer"
    probe = f"import sys, ppo_ray; dir(ppo_ray); print(*[name for name in {heavy.split()} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_type_checkers_see_the_names_that_programs_get() -> None:
    tree = ast.parse(inspect.getsource(ppo_ray))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        node.module.removeprefix("ppo_ray."): tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert seen == ppo_ray._HOMES
    assert sorted(name for names in seen.values() for name in names) == sorted(ppo_ray.__all__)


@pytest.mark.parametrize("name", ppo_ray.__all__)
def test_every_name_is_there_documented_and_on_the_page(name: str) -> None:
    found = getattr(ppo_ray, name)
    assert found.__name__ == name and inspect.getdoc(found)
    assert name in dir(ppo_ray)
    assert sum(f"`{name}`" in row for row in TABLE) == 1


def test_the_page_lists_nothing_else() -> None:
    assert {name for row in TABLE for name in re.findall(r"`(\w+)`", row)} == set(ppo_ray.__all__)


def test_a_wrong_name_is_an_attribute_error_and_a_module_is_found() -> None:
    with pytest.raises(AttributeError, match="module 'ppo_ray' has no attribute 'trian'"):
        _ = ppo_ray.trian
    from ppo_ray import trajectory

    assert inspect.ismodule(trajectory)


def test_every_program_is_run_below() -> None:
    tested = set(re.findall(r'run_(?:here|alone)\("([^"]+)"', Path(__file__).read_text()))
    assert tested == PROGRAMS.keys()


def test_update(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, advantages = run_here("Update", capsys)
    mean, grad_norm = map(float, figures.split())
    assert mean == pytest.approx(1 / 3) and grad_norm > 0
    rows = json.loads(advantages.replace("None", "null"))
    assert [row and len(row) for row in rows] == [2, 2, 2, None]
    assert (folder / "trained" / "model.safetensors").is_file()


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_here("Generate", capsys)
    assert len(set(lines)) == 4  # a seed of its own each
    assert all(float(line.split()[-1]) < 0 for line in lines)


def test_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, batch = run_here("Prompts", capsys)
    assert summary == "64 texts of prompts.parquet"
    assert batch.startswith("(0, 1, 2, 3) ['The ")


def test_classifier(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scores,) = run_here("Classifier", capsys)
    good, bad, empty = json.loads(scores.replace("None", "null"))
    assert 0 < good < 1 and 0 < bad < 1 and good != bad and empty is None


def test_reward_function(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run_here("Reward function", capsys) == ["[0.92, None]"]


def test_a_step_without_ray(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ([float(figure) for figure in line.split()] for line in run_here("Without Ray", capsys))
    assert first[1] == 0 != second[1]  # the KL: the policy has moved, the reference has not
    assert first[2] < 1e-4 and second[2] < 1e-4  # the engine computes with the weights of each step


@pytest.mark.slow
def test_train_evaluate_and_check(folder: Path, short_ray_folder: None) -> None:
    *_, history, checkpoint, scores = run_alone("Train")
    assert json.loads(history)[0] == 0 and len(json.loads(history)) == 2
    assert checkpoint == str(folder / "runs" / "film" / "checkpoints" / "final") and Path(checkpoint).is_dir()
    before, after = map(float, scores.split())
    *samples, mean = run_alone("Evaluate")  # the same responses as at the end of the run
    assert len(samples) == 4 and float(mean) == after != before
    again = ppo_ray.train(ppo_ray.load_config("film.yaml", ["ppo.learning_rate=1e-3", "resume=auto"]))
    assert [metrics["kl/per_sequence"] for metrics in again.history] == json.loads(history)  # nothing was left to do
    assert (str(again.folder.final_checkpoint), again.before, again.after) == (checkpoint, None, None)
    worker, difference = run_alone("Check")[-1].split()
    assert worker == "rollout-0" and float(difference) < 1e-4


@pytest.mark.slow
def test_vllm(folder: Path) -> None:
    from ppo_ray import GenerationRequest, HFEngine, Sampling

    (expected,) = HFEngine("policy").generate([GenerationRequest((84, 90), 8, 0)], Sampling(temperature=0.0))
    assert run_alone("Generate with vLLM")[-1] == str(expected.response_ids)
