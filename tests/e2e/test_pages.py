"""The pages for newcomers, byte for byte: quickstart.md, own_task.md, and a program of diagnostics.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
QUICKSTART, OWN_TASK, DIAGNOSTICS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("quickstart", "own_task", "diagnostics")
)


@pytest.fixture
def folder(tmp_path: Path, short_ray_folder: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the repository's configs, in which commands of this environment are found."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PPO_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def write_files(page: str, folder: Path) -> None:
    """Write the files that a page shows under their names."""
    for name, text in re.findall(r"^`(\w+\.\w+)`:\n\n```\w+\n(.*?)```", page, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(text)


def run(page: str, beginning: str, folder: Path) -> str:
    """Run the block of a page that begins so, in a shell or in Python; returns what it printed."""
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    ((language, block),) = [item for item in blocks if item[1].startswith(beginning)]
    program = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    result = subprocess.run([*program, block], cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def steps(run: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "event" not in record]


@pytest.mark.timeout(900)
def test_the_quick_start(folder: Path) -> None:
    write_files(QUICKSTART, folder)
    run(QUICKSTART, "ppo-ray demo --task toy\n", folder)
    toy = folder / "runs" / "toy"
    first, *_, last = steps(toy)
    assert (first["step"], last["step"]) == (0, 29) and last["score/mean"] > first["score/mean"] + 0.3
    table = QUICKSTART[QUICKSTART.index("## What is in the folder") : QUICKSTART.index("## Go on")]
    files = [
        name for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.+?)`", line)
    ]
    assert len(files) == 12 and all((toy / name).exists() for name in files)
    assert len(run(DIAGNOSTICS, "import pandas", folder).splitlines()) == 6  # five rows below their names

    printed = run(QUICKSTART, "ppo-ray demo --task toy steps=40", folder)  # and evaluates, and plans
    assert len(steps(toy)) == 40 and "It fits" in printed
    assert run(QUICKSTART, "from transformers", folder).startswith("the old house ")
    run(QUICKSTART, "python > questions.jsonl", folder)
    run(QUICKSTART, "ppo-ray plan task.yaml", folder)  # and trains
    assert len(steps(folder / "runs" / "task")) == 10


@pytest.mark.timeout(600)
def test_a_task_of_ones_own(folder: Path) -> None:
    write_files(OWN_TASK, folder)
    run(OWN_TASK, "ppo-ray assets toy", folder)  # and trains, and goes on
    task = folder / "runs" / "task"
    found = steps(task)
    assert len(found) == 6 and [step["step"] for step in found if "eval/answer_mean" in step] == [0, 2, 4]
    for step in range(6):
        for sample in pq.read_table(task / "trajectories" / f"step-{step:05d}.parquet").to_pylist():
            system, user = json.loads(sample["messages"])
            answer, text = sample["row"]["answer"], sample["response"]
            assert system == {"role": "system", "content": "Answer with the number alone."}
            assert user["content"] == f"What comes after {int(answer) - 1}?"
            brevity = pytest.approx(1 - len(text) / 100) if text.strip() else None
            assert sample["parts"] == {"answer": float(answer in text), "brevity": brevity}
            wanted = sample["parts"]["answer"] + 0.1 * (sample["parts"]["brevity"] or 0)
            assert sample["score"] == pytest.approx(wanted, abs=1e-6)
    before, after = (json.loads((task / f"evaluation_{when}.json").read_text()) for when in ("before", "after"))
    assert found[0]["eval/score_mean"] == before["mean_score"] and found[0]["eval/kl_per_sequence"] == 0
    assert after["figures"]["eval/kl_per_sequence"] != 0
    assert run(OWN_TASK, "from transformers", folder).startswith("user: What comes after 7?\nassistant: ")
