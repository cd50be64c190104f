import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_ray.events import ActorReport, Event
from ppo_ray.run.log import MetricsLog, read_actors, read_steps


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time stands still unless a test moves it."""
    now = [100.0]
    monkeypatch.setattr("ppo_ray.run.log.time.monotonic", lambda: now[0])
    return now


def read(folder):
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert row.pop("time/step_s") == 0
    return rows


def test_seconds_of_a_step_are_those_since_the_last_line(tmp_path, clock):
    with MetricsLog(tmp_path) as log:
        clock[0] += 2.5
        assert log.write(0, {})["time/step_s"] == 2.5
        clock[0] += 4
        assert log.write(1, {"a": 1.0}) == {"step": 1, "a": 1.0, "time/step_s": 4}


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        record = log.write(0, {"score/mean": 0.5, "learner/tokens": 12})
        assert record.pop("time/step_s") == 0
        assert read(tmp_path) == [record] == [{"step": 0, "score/mean": 0.5, "learner/tokens": 12.0}]
        log.write(1, {"score/mean": 0.75})
    assert [row["step"] for row in read(tmp_path)] == [0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(value, tmp_path):
    with MetricsLog(tmp_path) as log:
        returned = log.write(3, {"a": value, "b": 1.0})
    assert read(tmp_path) == [{"step": 3, "a": None, "b": 1.0}]
    assert returned["a"] == value or math.isnan(returned["a"])


def test_tensorboard_reads_the_same_figures(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step, score in enumerate([0.5, 0.25, -1.0]):
            log.write(step, {"score/mean": score, "kl/per_sequence": 2.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["kl/per_sequence", "score/mean", "time/step_s"]
    assert [(event.step, event.value) for event in events.Scalars("score/mean")] == [(0, 0.5), (1, 0.25), (2, -1.0)]
    assert [event.value for event in events.Scalars("kl/per_sequence")] == [0.0, 2.0, 4.0]


def test_nothing_is_made_before_the_first_step_and_closing_twice_is_fine(tmp_path):
    log = MetricsLog(tmp_path)
    log.close()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_files_are_closed_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), MetricsLog(tmp_path) as log:
        log.write(0, {"a": 1.0})
        raise RuntimeError
    assert read(tmp_path) == [{"step": 0, "a": 1.0}]


def test_a_run_that_goes_on_makes_its_steps_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(3):
            log.write(step, {"a": math.nan if step == 1 else step})
        log.event(Event("worker_replaced", "rollout-0 was replaced", "rollout-0"))
        log.write(3, {"a": 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "a": 4.')  # killed while it wrote
    with MetricsLog(tmp_path) as log:
        history = log.resume(2)
        log.event(Event("resumed", "going on"))
        log.write(2, {"a": 20})
    assert [(record["step"], str(record["a"])) for record in history] == [(0, "0.0"), (1, "nan")]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("event", record.get("a")) for record in records] == [0, None, "worker_replaced", "resumed", 20]
    assert {"event", "message", "worker", "step", "time"} == records[2].keys()
    assert (records[2]["step"], records[3]["step"]) == (3, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a") if event.step != 1] == [(0, 0.0), (2, 20.0)]


def test_a_run_that_begins_has_nothing_to_make_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        assert log.resume(0) == []
    assert list(tmp_path.iterdir()) == []


def test_steps_are_read_without_a_change_to_the_files(tmp_path):
    assert read_steps(tmp_path) == []
    with MetricsLog(tmp_path) as log:
        written = [log.write(step, {"a": step / 2}) for step in range(2)]
        log.event(Event("resumed", "going on"))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "a"')  # cut off
    before = path.read_bytes()
    assert read_steps(tmp_path) == written
    assert [(row["step"], row["a"]) for row in written] == [(0, 0.0), (1, 0.5)]
    assert path.read_bytes() == before


def test_what_actors_did_is_beside_the_metrics_and_goes_back_with_them(tmp_path):
    def report(step):
        return {"rollout-0": ActorReport("node-7", {"time/generate_s": 0.25, "memory/rollout_gib": 1.0 + step / 3})}

    with MetricsLog(tmp_path) as log:
        for step in range(3):
            log.write(step, {"a": 1.0}, report(step))
        log.write(3, {"a": 1.0})
    assert list(read_actors(tmp_path)) == [0, 1, 2]
    assert read_actors(tmp_path)[1] == {
        "rollout-0": {"host": "node-7", "time/generate_s": 0.25, "memory/rollout_gib": 1.3333}
    }
    with (tmp_path / "actors.jsonl").open("a") as lines:
        lines.write('nonsense\n{"step": 8, "actors": [1]}\n{"step": 9, "act')
    assert list(read_actors(tmp_path)) == [0, 1, 2]
    with MetricsLog(tmp_path) as log:
        log.resume(2)
        log.write(2, {"a": 1.0}, {"learner-0": ActorReport(None, {"memory/learner_gib": float("nan")})})
    assert list(read_actors(tmp_path)) == [0, 1, 2] and read_actors(tmp_path)[2] == {"learner-0": {}}
    assert len((tmp_path / "actors.jsonl").read_text().splitlines()) == 3


def test_hostile_lines_of_actors_are_left_out(tmp_path):
    odd = {"a": {"host": 3}, "b": [1], "c": {"host": "<b>", "x": "text", "y": True, "z": 1e999, "memory/c_gib": 2}}
    (tmp_path / "actors.jsonl").write_text(json.dumps({"step": 0, "actors": odd}) + "\n")
    assert read_actors(tmp_path) == {0: {"c": {"host": "<b>", "memory/c_gib": 2}}}
    assert read_actors(tmp_path / "none") == {}
