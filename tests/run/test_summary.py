import io

import pytest
from rich.console import Console

from ppo_ray.run.evaluation import Evaluation, Sample
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.summary import print_evaluation, print_summary

HISTORY = [
    {
        "step": 0,
        "score/mean": 0.25,
        "kl/per_sequence": 0.0,
        "time/generate_s": 3.0,
        "time/learn_s": 5.0,
        "time/step_s": 10.0,
    },
    {
        "step": 1,
        "score/mean": 0.75,
        "kl/per_sequence": 1.5,
        "time/generate_s": 2.0,
        "time/learn_s": 4.0,
        "time/step_s": 8.0,
    },
]


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=60)


def shown(console):
    return console.file.getvalue()


def test_summary_says_what_changed_and_where_things_are(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("runs/a")
    folder.samples.touch()
    print_summary(console, folder, HISTORY, Evaluation(0.125, 1.3, 64, 0, ()), Evaluation(0.875, 1.1, 64, 2, ()))
    output = shown(console)
    assert "held-out mean score +0.12 -> +0.88 (+0.75; 64 prompts" in output
    assert "2 of the responses could not be scored" in output
    assert "batch mean score +0.25 -> +0.75 over 2 steps; KL to the reference 1.50 nats" in output
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["generate"]] == ["2.50", "2.00", "3.00", "28%"]  # 5 of 18 seconds
    assert [cell.strip() for cell in rows["whole step"]] == ["9.00", "8.00", "10.00", "100%"]
    assert "sync" not in rows
    assert "runs/a/samples.md" in output and "curves.png" not in output


def test_summary_without_evaluation_or_steps(console, tmp_path):
    print_summary(console, RunFolder.create(tmp_path / "a"), [], None, None)
    assert "held-out" not in shown(console) and "trajectories" in shown(console)


def test_evaluation_is_printed_as_plain_text(console):
    sample = Sample("[red]I[/red]", "saw\x1b[31m it", None)
    print_evaluation(console, Evaluation(0.5, 1.25, 1, 1, (sample,)))
    assert "[red]I[/red]" in shown(console) and "\x1b" not in shown(console)
    assert (
        "held-out mean score +0.50 (standard deviation 1.25, 1 prompts); 1 of the responses could not be scored"
        in shown(console)
    )
