import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from ppo_ray import checkpoint
from ppo_ray.checkpoint import RunState
from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.run.checkpoints import Checkpoints
from ppo_ray.run.folder import RunFolder, config_text
from ppo_ray.run.resume import Difference, differences, find_start, is_finished, open_folder
from ppo_ray.run.run import Run
from ppo_ray.run.train import train


def make(folder: Path, *overrides: str) -> Config:
    base = [f"output_dir={folder}", "model.path=m", "prompts.path=p", "reward.path=r", "steps=10"]
    return load_config(None, [*base, *overrides])


def leave_run(folder: Path, *steps: int, overrides: tuple[str, ...] = (), done: bool = False) -> RunFolder:
    """Make a folder in which a run has left checkpoints after these steps."""
    config = make(folder, *overrides)
    run = RunFolder.create(folder)
    run.write_config(config)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, config_text(config), lambda event: None)
    for step in steps:
        checkpoint.write(checkpoints.path(step), RunState(step, step * 8, "f00"), "", lambda path: None)
    if done:
        checkpoints.finish_run(steps[-1])
    return run


def start(run: RunFolder, config: Config, fingerprint: str = "f00"):
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, config_text(config), lambda event: None)
    return find_start(run, config, checkpoints, fingerprint)


def test_a_new_run_begins_at_its_first_step(tmp_path: Path) -> None:
    config = make(tmp_path / "run", "resume=auto")
    found = start(open_folder(config), config)
    assert (found.state, found.checkpoint, found.changed) == (RunState(0, 0, "f00"), None, ())
    with pytest.raises(InputError, match="holds no run to go on with"):
        open_folder(make(tmp_path / "other", "resume=required"))
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 2, 4)
    found = start(run, make(tmp_path, "resume=required"))
    assert (found.state, found.checkpoint) == (RunState(4, 32, "f00"), run.checkpoints / "step-00004")
    with pytest.raises(InputError, match="holds another run"):
        open_folder(make(tmp_path))


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = leave_run(tmp_path)
    assert start(run, make(tmp_path, "resume=required")).state.step == 0


def test_what_may_change(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 4)
    changes = ("steps=20", "checkpoint.keep_last=5", "ray.call_timeout_s=9", "rollout.workers=2", "learner.threads=1")
    found = start(run, make(tmp_path, "resume=auto", *changes))
    assert [str(item) for item in found.changed] == [
        "steps: 10 -> 20",
        "rollout.workers: 1 -> 2",
        "learner.threads: 2 -> 1",
        "checkpoint.keep_last: 2 -> 5",
        "ray.call_timeout_s: 1800.0 -> 9.0",
    ]


def test_sets_of_an_evaluation_may_come_and_go(tmp_path: Path) -> None:
    def sets(**paths: str) -> str:
        return f"evaluation.sets={{{', '.join(f'{name}: {{path: {path}}}' for name, path in paths.items())}}}"

    run = leave_run(tmp_path, 4, overrides=(sets(easy="e", hard="h"),))
    found = start(run, make(tmp_path, "resume=auto", sets(hard="other", new="n")))
    changed = [str(item) for item in found.changed]
    assert "evaluation.sets.hard.path: h -> other" in changed and "evaluation.sets.easy.path: e -> null" in changed
    assert "evaluation.sets.new.path: null -> n" in changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("ppo.learning_rate=1e-3", "ppo.learning_rate: 1.41e-05 -> 0.001"),
        ("model.path=other", "model.path: m -> other"),
        ("rollout.batch_size=64", "rollout.batch_size: 128 -> 64"),
        ("ppo.max_grad_norm=1", "ppo.max_grad_norm: null -> 1.0"),
    ],
)
def test_what_may_not(tmp_path: Path, change: str, said: str) -> None:
    run = leave_run(tmp_path, 4)
    with pytest.raises(InputError) as caught:
        start(run, make(tmp_path, "resume=auto", "ray.max_restarts=9", change))
    assert said in str(caught.value)
    assert "max_restarts" not in str(caught.value)


def test_a_schedule_that_ends_with_the_steps_keeps_them(tmp_path: Path) -> None:
    schedule = "ppo.learning_rate_schedule=linear"
    run = leave_run(tmp_path, 4, overrides=(schedule,))
    assert start(run, make(tmp_path, "resume=auto", schedule)).state.step == 4
    with pytest.raises(InputError, match=r"learning_rate_schedule=linear ends with them\)\n  steps: 10 -> 20"):
        start(run, make(tmp_path, "resume=auto", schedule, "steps=20"))


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 4)
    with pytest.raises(InputError, match=r"prompts.path=p: the texts or the tokenizer .*bad, was f00"):
        start(run, make(tmp_path, "resume=auto"), "bad")


def test_fewer_steps_than_were_made(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 4)
    with pytest.raises(InputError, match="steps=3: the run has made 4 steps already"):
        start(run, make(tmp_path, "resume=auto", "steps=3"))


def test_a_finished_run(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "done", 10, done=True)
    assert is_finished(run, make(run.path, "resume=auto"))
    assert not is_finished(run, make(run.path, "resume=auto", "steps=20"))
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        is_finished(run, make(run.path, "resume=auto", "seed=1"))
    assert not is_finished(leave_run(tmp_path / "not", 10), make(tmp_path / "not", "resume=auto"))  # not yet evaluated
    (run.checkpoints / "step-00010" / "run.json").write_text("{}")
    assert not is_finished(run, make(run.path, "resume=auto"))


def test_training_shows_what_a_finished_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = leave_run(tmp_path, 10, done=True)
    folder.metrics.write_text('{"step": 0, "score/mean": 0.25}\n{"step": 1, "score/mean": 0.75}\n')
    console = Console(file=io.StringIO(), width=300)
    finished = SimpleNamespace(is_finished=True, folder=folder, say=console.print)
    monkeypatch.setattr(Run, "open", lambda config, console: nullcontext(finished))
    report = train(make(tmp_path, "resume=auto"), console)
    said = console.file.getvalue()
    assert "nothing to do" in said and "batch mean score +0.25 -> +0.75 over 2 steps" in said
    assert str(folder.final_checkpoint) in said
    assert [step["score/mean"] for step in report.history] == [0.25, 0.75]


def test_differences_name_every_leaf(tmp_path: Path) -> None:
    before, after = make(tmp_path), make(tmp_path, "ppo.whiten_advantages=false")
    assert differences(before, before) == []
    assert differences(before, after) == [Difference("ppo.whiten_advantages", True, False)]
    assert str(differences(before, after)[0]) == "ppo.whiten_advantages: true -> false"
