import io
import json
import shlex

import pytest
from rich.console import Console

from ppo_ray.config import load_config
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


CONFIG = ["output_dir=x", "model.path=m", "prompts.path=p.csv", "reward.path=r"]


@pytest.fixture
def config():
    return load_config(None, [*CONFIG, "steps=2"])


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=60)


def shown(console):
    return console.file.getvalue()


def test_summary_says_what_changed_and_where_things_are(console, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("runs/a")
    folder.samples.touch()
    print_summary(
        console, folder, config, HISTORY, Evaluation(0.125, 1.3, 64, 0, ()), Evaluation(0.875, 1.1, 64, 2, ())
    )
    output = shown(console)
    assert "held-out mean score +0.12 -> +0.88 (+0.75; 64 prompts" in output
    assert "2 of the responses could not be scored" in output
    assert "batch mean score +0.25 -> +0.75 over 2 steps; KL to the reference 1.50 nats per sequence" in output
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["generate"]] == ["2.50", "2.00", "3.00", "28%"]  # 5 of 18 seconds
    assert [cell.strip() for cell in rows["whole step"]] == ["9.00", "8.00", "10.00", "100%"]
    assert "sync" not in rows
    assert "runs/a/samples.md" in output and "curves.png" not in output
    assert "2 of 2 steps within all healthy ranges" in output
    assert "  ppo-ray train runs/a/config.yaml --resume steps=4\n" in output
    schedule = load_config(None, [*CONFIG, "ppo.learning_rate_schedule=linear"])
    print_summary(console, folder, schedule, HISTORY, None, None)
    assert shown(console).count("--resume") == 1


def test_the_next_command_names_the_reward_that_a_checkpoint_is_not_believed(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ["output_dir=x", "model.path=m", "prompts.path=p.csv"]
    judge = {"path": "j", "prompt": "judge's.txt", "pattern": "(yes|no)", "scores": {"yes": 1.0}}
    parts = [{"name": "length", "function": "m:f", "weight": 0.5}, {"name": "b", "path": "c"}]
    rewards = ["function=m:f", "url=https://a.b/score", f"judge={json.dumps(judge)}", f"parts={json.dumps(parts)}"]
    for number, option in enumerate(rewards):
        config = load_config(None, [*own, f"reward.{option}"])
        print_summary(console, RunFolder.create(f"runs/{number}"), config, HISTORY, None, None)
        line = next(line for line in shown(console).splitlines() if f"runs/{number}/checkpoints/final" in line)
        words = shlex.split(line)
        assert words[:3] == ["ppo-ray", "evaluate", f"runs/{number}/checkpoints/final"]
        assert load_config(None, [*own, *words[3:]]).reward == config.reward


def test_samples_are_cut_to_the_width_and_move_no_cursor(console, config, tmp_path):
    before = Evaluation(0.0, 1.0, 4, 0, (Sample("x" * 99 + "the end", "[red]bad\x1b[2J\n" + "y" * 99, None),) * 4)
    after = Evaluation(1.0, 1.0, 4, 0, (Sample("x" * 99 + "the end", "good", 1.5),) * 4)
    print_summary(console, RunFolder.create(tmp_path / "a"), config, [], before, after)
    rows = [line for line in shown(console).splitlines() if "the end" in line]
    assert len(rows) == 3 and all(len(row) <= 60 for row in rows)
    assert "[red]bad" in rows[0] and "good" in rows[0] and "+1.50" in rows[0] and "\x1b" not in shown(console)


def test_summary_without_evaluation_or_steps(console, config, tmp_path):
    print_summary(console, RunFolder.create(tmp_path / "a"), config, [], None, None)
    assert "held-out" not in shown(console) and "trajectories" in shown(console)


def test_evaluation_is_printed_as_plain_text(console):
    sample = Sample("[red]I[/red]", "saw\x1b[31m it", None)
    print_evaluation(console, Evaluation(0.5, 1.25, 1, 1, (sample,)))
    assert "[red]I[/red]" in shown(console) and "\x1b" not in shown(console)
    assert (
        "held-out mean score +0.50 (standard deviation 1.25, 1 prompts); 1 of the responses could not be scored"
        in shown(console)
    )
