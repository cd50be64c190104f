"""Trackers that follow a run: what they get, and what the run is spared when they fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.events import Event
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.follow import Sent, StepReader, state_file
from ppo_ray.run.log import MetricsLog, read_steps
from ppo_ray.run.tracking import Tracking, send_rest, track
from ppo_ray.trajectory import LEARNED_SCHEMA

MODULE = '''
import json, os, pathlib, time

class Recorder:
    """Writes each call on a line; its file is in the folder that the run gives it."""

    def __init__(self, **options):
        self.options = options

    def start(self, run):
        self.path = run.folder / "calls.jsonl"
        self.write("start", run.id, run.name, run.project, run.config["steps"])

    def log_step(self, step, metrics, samples):
        self.write("step", step, metrics, samples)

    def log_file(self, path):
        self.write("file", path.name)

    def close(self, finished):
        self.write("close", finished)

    def write(self, *call):
        with self.path.open("a") as lines:
            lines.write(json.dumps(call) + "\\n")

class Raising(Recorder):
    def log_step(self, step, metrics, samples):
        if step == 2:
            raise ValueError("no\\x1b[31m room for step 2")
        super().log_step(step, metrics, samples)

class Hanging(Recorder):
    def log_step(self, step, metrics, samples):
        time.sleep(600)

class Dying(Recorder):
    def log_step(self, step, metrics, samples):
        os._exit(7)

class Killed(Recorder):
    """Dies once, between its third step and the note of it; it can tell what it holds."""

    def start(self, run):
        super().start(run)
        return sum('"step"' in line for line in self.path.read_text().splitlines())

    def log_step(self, step, metrics, samples):
        super().log_step(step, metrics, samples)
        if step == 2 and not (mark := self.path.with_name("died")).exists():
            mark.touch()
            os.kill(os.getpid(), 9)

class Refusing(Recorder):
    def __init__(self):
        raise OSError("no way there")
'''


@pytest.fixture
def make_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Return what makes the config of a run in `tmp_path`/run, and a module of trackers beside it."""
    (tmp_path / "own_trackers.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(*classes: str, **options: object) -> Config:
        names = ",".join(f"own_trackers:{name}" for name in classes)
        given = [f"tracking.{name}={value}" for name, value in options.items()]
        required = ["model.path=m", "prompts.path=p", "reward.path=r", f"output_dir={tmp_path / 'run'}", "steps=30"]
        return load_config(None, [*required, f"tracking.trackers=[{names}]", *given])

    return make


@pytest.fixture
def events() -> list[Event]:
    return []


def open_folder(config: Config) -> RunFolder:
    folder = RunFolder.open(config.output_dir)
    folder.write_config(config)
    return folder


def calls(folder: RunFolder, name: str) -> list[list]:
    lines = (folder.tracking / f"own_trackers-{name}" / "calls.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(folder: RunFolder, name: str) -> list[int]:
    return [call[1] for call in calls(folder, name) if call[0] == "step"]


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    ends_at = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends_at, "too late"
        time.sleep(0.05)


def test_a_tracker_gets_what_is_in_the_log(make_config, events):
    config = make_config("Recorder", "Killed", project="films", num_samples=2, samples_every_steps=2)
    folder = open_folder(config)
    folder.report.write_text("<p>")
    rows = {
        "sample_id": [4, 5, 6],
        "prompt": ["p", "q", "r"],
        "response": ["a", "\x1b]0;b", "c"],
        "response_ids": [[1, 2], [3], [4]],
        "score": [0.5, None, 1.0],
        "kl": [[1.0, 0.5], None, [0.0]],
        "advantages": [[1.0, 2.0], None, [0.0]],
        "finish_reason": ["stop", "length", "stop"],
    }
    schema = pa.schema([LEARNED_SCHEMA.field(name) for name in rows], metadata=LEARNED_SCHEMA.metadata)
    pq.write_table(pa.table(rows, schema), folder.trajectory_file(0))
    with MetricsLog(folder.path) as log, track(config, folder, events.append):
        for step in range(4):
            log.write(step, {"score/mean": step / 4, "odd": float("nan") if step else 1.0})
            log.event(Event("worker_replaced", "rollout-0 was replaced"))
    for name in ("Recorder", "Killed"):
        made = calls(folder, name)
        assert [call[0] for call in made if call[0] != "start"] == [
            *("step",) * len(steps(folder, name)),
            "file",
            "close",
        ]
        assert made[-1] == ["close", True] and made[-2] == ["file", "report.html"]
    run_id = (folder.tracking / "run_id").read_text().strip()
    assert calls(folder, "Recorder")[0] == ["start", run_id, "run", "films", 30] and len(run_id) == 21
    sent = [call[1:] for call in calls(folder, "Recorder") if call[0] == "step"]
    logged = read_steps(folder.path)
    finite = [{name: value for name, value in row.items() if name != "step" and value == value} for row in logged]
    assert [(step, metrics) for step, metrics, _ in sent] == list(enumerate(finite))
    shared = {"step": 0, "tokens": 2, "finish_reason": "stop"}
    first = {"sample_id": 4, "prompt": "p", "response": "a", "score": 0.5, "kl": 1.5, "advantage": 1.5}
    assert sent[0][2][0] == first | shared and [row["sample_id"] for row in sent[0][2]] == [4, 5]
    assert [samples for _, _, samples in sent[1:]] == [None] * 3
    assert steps(folder, "Killed") == [0, 1, 2, 3]
    assert [(event.kind, event.worker) for event in events] == [("tracker_failed", "own_trackers:Killed")]
    assert "(exit code -9) and is started again" in events[0].message


def test_what_raises_hangs_or_dies_costs_the_run_nothing(make_config, events):
    names = ["Raising", "Hanging", "Dying", "Refusing", "Recorder"]
    config = make_config(*names, close_timeout_s=3)
    folder = open_folder(config)
    with MetricsLog(folder.path) as log, track(config, folder, events.append) as tracking:
        for step in range(5):
            log.write(step, {"score/mean": 0.5})
            tracking.check()
        assert (folder.tracking / "run_id").is_file()  # all steps are made: whoever is late was not waited for

        def is_known() -> bool:
            """Say whether each fault has shown, however slow the machine is."""
            tracking.check()
            _, _, dying, *_ = tracking._processes
            noted = (Sent.read(state_file(folder, f"own_trackers:{name}")).problem for name in ("Raising", "Refusing"))
            return all(noted) and dying.restarts == 3 and dying.exit_code() is not None

        wait_until(is_known, 300)
    told = {event.worker.partition(":")[2]: event.message for event in events if "ppo-ray track" in event.message}
    assert told.keys() == {"Raising", "Hanging", "Dying", "Refusing"}
    assert "ValueError: no\x1b[31m room for step 2; it lacks 3 of the run's steps" in told["Raising"]
    assert "(exit code -9); it lacks 5 of the run's steps" in told["Hanging"]
    assert "(exit code 7); it lacks 5 of the run's steps" in told["Dying"]
    assert "OSError: no way there; it lacks 5 of the run's steps" in told["Refusing"]
    assert all(sum(event.worker == name for event in events) <= 2 for name in {event.worker for event in events})
    assert steps(folder, "Recorder") == [0, 1, 2, 3, 4] and steps(folder, "Raising") == [0, 1]
    assert calls(folder, "Raising")[-1] == ["close", True]  # what it has is not lost


def test_a_process_that_is_killed_is_started_again(make_config, events):
    config = make_config("Recorder")
    folder = open_folder(config)
    with MetricsLog(folder.path) as log:
        tracking = Tracking(config, folder, events.append)
        tracking.start()
        log.write(0, {})
        state = state_file(folder, config.tracking.trackers[0])
        wait_until(lambda: Sent.read(state).steps == 1)
        os.kill(tracking._processes[0]._process.pid, signal.SIGKILL)
        tracking._processes[0]._process.wait(30)
        log.write(1, {})
        tracking.check()
        tracking.check()
        tracking.end(finished=True)
    assert steps(folder, "Recorder") == [0, 1]
    assert [event.message for event in events] == [
        "tracker own_trackers:Recorder: its process ended (exit code -9) and is started again "
        "(tracking/own_trackers-Recorder.log)"
    ]


@pytest.mark.parametrize("only_checkpointed", [False, True])
def test_a_run_that_was_killed_goes_on_without_a_step_sent_twice(make_config, events, only_checkpointed):
    config = make_config("Recorder", only_checkpointed=str(only_checkpointed).lower())
    folder = open_folder(config)
    state = state_file(folder, config.tracking.trackers[0])
    with MetricsLog(folder.path) as log:
        tracking = Tracking(config, folder, events.append)
        tracking.start()
        for step in range(2):
            log.write(step, {"a": 1.0})
        (folder.checkpoints / "step-00002").mkdir(parents=True)
        for step in range(2, 5):
            log.write(step, {"a": 1.0})
        wait_until(lambda: Sent.read(state).steps == (2 if only_checkpointed else 5))
        for process in tracking._processes:  # as the driver's end closes it
            process._process.stdin.close()
            assert process._process.wait(60) == 0
    with MetricsLog(folder.path) as log, track(config, folder, events.append):
        log.resume(2)
        for step in range(2, 6):
            log.write(step, {"a": 2.0})
    assert events == [] and steps(folder, "Recorder") == [0, 1, 2, 3, 4, 5]
    starts = [call for call in calls(folder, "Recorder") if call[0] == "start"]
    assert len(starts) == 2 and starts[0] == starts[1]  # the same id
    assert [call for call in calls(folder, "Recorder") if call[0] == "close"] == [["close", False], ["close", True]]
    values = [call[2]["a"] for call in calls(folder, "Recorder") if call[0] == "step"]
    assert values == ([1, 1, 2, 2, 2, 2] if only_checkpointed else [1, 1, 1, 1, 1, 2])
    if only_checkpointed:  # to the last second
        sent = [call[2] for call in calls(folder, "Recorder") if call[0] == "step"]
        assert sent == [{name: row[name] for name in ("a", "time/step_s")} for row in read_steps(folder.path)]


def test_what_a_tracker_lacks_is_sent_later(make_config, events):
    config = make_config("Raising", close_timeout_s=20)
    folder = open_folder(config)
    with MetricsLog(folder.path) as log, track(config, folder, events.append):
        for step in range(5):
            log.write(step, {})
    assert steps(folder, "Raising") == [0, 1]
    text = (folder.path.parent / "own_trackers.py").read_text()
    (folder.path.parent / "own_trackers.py").write_text(text.replace("if step == 2", "if step == 99"))
    folder.final_checkpoint.mkdir(parents=True)
    said: list[str] = []
    assert send_rest(config, said.append)
    assert said == ["own_trackers:Raising has 5 of 5 steps"] and steps(folder, "Raising") == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="has another config:\n  seed: 0 -> 1"):
        send_rest(config.model_copy(update={"seed": 1}), said.append)


def test_the_log_is_read_on_and_read_again_when_it_is_another(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = StepReader(path)
    assert list(reader.read()) == []
    path.write_text('{"step": 0, "a": 1.5, "b": null}\n{"event": "resumed", "step": 1}\nnonsense\n{"step": 1, "a"')
    assert list(reader.read()) == [(0, {"a": 1.5})]
    with path.open("a") as lines:
        lines.write(": 2}\n")
    assert list(reader.read()) == [(1, {"a": 2})]
    (tmp_path / "other").write_text('{"step": 0, "a": 3}\n')
    (tmp_path / "other").replace(path)
    assert list(reader.read()) == [(0, {"a": 3})]


def test_the_tracker_of_the_page_keeps_a_curve(make_config, events, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    (program,) = re.findall(r"`csv_tracker.py`:\n\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "csv_tracker.py").write_text(program)
    (options,) = re.findall(r"`tracking.options=(\{\".*?\}\})`", page)
    given = make_config(options=options, trackers="[csv_tracker:CsvTracker]")
    folder = open_folder(given)
    with MetricsLog(folder.path) as log, track(given, folder, events.append):
        log.write(0, {"score/mean": 0.5, "kl/per_sequence": 0.0})
        log.write(1, {"score/mean": 0.75})
    lines = (folder.tracking / "csv_tracker-CsvTracker" / "scores.csv").read_text().splitlines()
    assert lines == ["0,0.5,0.0", "1,0.75,"] and events == []


def test_nothing_is_imported_or_written_without_trackers(make_config, events, tmp_path):
    config = load_config(None, ["model.path=m", "prompts.path=p", "reward.path=r", f"output_dir={tmp_path / 'run'}"])
    folder = open_folder(config)
    with track(config, folder, events.append) as tracking:
        tracking.check()
    assert not folder.tracking.exists()
    program = (
        "import sys; from ppo_ray.run import run, train, tracking, follow;"
        "print(*{'wandb', 'mlflow', 'trackio', 'swanlab'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
