"""The real libraries, offline: what their stores hold after a kill and a resume; what is not installed is skipped."""

import importlib.util
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.events import Event
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.follow import Sent, state_file
from ppo_ray.run.log import MetricsLog, read_steps
from ppo_ray.run.trackers import read_store
from ppo_ray.run.tracking import Tracking, track
from ppo_ray.trajectory import LEARNED_SCHEMA

HOSTILE = "<script>alert(1)</script>\x00\x1b[31m=1+1\u202e" + "a" * 10_000
Rows = dict[int, dict[str, float]]


def read_wandb(folder: Path, run_id: str) -> tuple[Rows, str]:
    from wandb.proto import wandb_internal_pb2

    rows: Rows = {}
    config = ""
    for path in sorted(folder.glob("run/tracking/wandb/wandb/offline-run-*/*.wandb")):
        assert path.name == f"run-{run_id}.wandb"
        for data in read_store(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = items.pop("_step")
                assert step not in rows, "a step was sent twice"
                rows[step] = {name: value for name, value in items.items() if name[0] != "_"}
            elif kind == "run":
                config = str(record.run.config)
    tables = list(folder.glob("run/tracking/wandb/wandb/offline-run-*/files/media/table/*.json"))
    assert {json.loads(table.read_text())["data"][0][3] for table in tables} == {
        HOSTILE
    }  # the killed one's lies there too
    assert len(list(folder.glob("run/tracking/wandb/wandb/offline-run-*/files/report.html"))) == 1
    return rows, config


def read_mlflow(folder: Path, run_id: str) -> tuple[Rows, str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    place = client.get_experiment_by_name("films").experiment_id
    (run,) = client.search_runs([place])
    assert (run.info.run_name, run.info.status, run.data.tags["ppo_ray_run"]) == ("run", "FINISHED", run_id)
    rows: Rows = {}
    for name in run.data.metrics:
        for item in client.get_metric_history(run.info.run_id, name):
            row = rows.setdefault(item.step, {})
            assert name not in row, "a figure was sent twice"
            row[name] = item.value
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "report.html", "samples"}
    table = Path(client.download_artifacts(run.info.run_id, "samples/step-00000.json"))
    assert json.loads(table.read_text())["data"][0][3] == HOSTILE
    assert run.data.params["ppo.learning_rate"] == "1.41e-05"
    return {
        step: {name.replace("pass_4", "pass@4"): value for name, value in row.items()} for step, row in rows.items()
    }, str(run.data.params)


def read_trackio(folder: Path, run_id: str) -> tuple[Rows, str]:
    (path,) = (folder / "trackio").glob("films*.db")
    with sqlite3.connect(path) as store:
        found = store.execute("select run_name, step, metrics from metrics").fetchall()
        ((config,),) = store.execute("select config from configs").fetchall()
    assert {name for name, _, _ in found} == {f"run-{run_id[:6]}"}
    rows = {step: json.loads(metrics) for _, step, metrics in found}
    assert len(rows) == len(found), "a step was sent twice"
    assert HOSTILE[:25] in json.dumps(rows[0].pop("samples"))
    return rows, str(config)


def read_swanlab(folder: Path, run_id: str) -> tuple[Rows, str]:
    from swanlab.proto.swanlab.record.v1 import record_pb2

    rows: Rows = {}
    paths = sorted(folder.glob("run/tracking/swanlab/run-*/*.swanlab"))
    assert {path.name for path in paths} == {f"run-{run_id}.swanlab"}
    for path in paths:
        for data in read_store(path):
            record = record_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "scalar":
                row = rows.setdefault(record.scalar.step, {})
                assert record.scalar.key not in row, "a figure was sent twice"
                row[record.scalar.key] = record.scalar.value.number
    texts = [path.read_text() for path in folder.glob("run/tracking/swanlab/run-*/media/text/*.txt")]
    assert texts and all(HOSTILE in text for text in texts)
    assert list(folder.glob("run/tracking/swanlab/run-*/files/report.html"))
    return rows, "".join(path.read_text() for path in folder.glob("run/tracking/swanlab/run-*/files/config.yaml"))


READERS: dict[str, Callable[[Path, str], tuple[Rows, str]]] = {
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "swanlab": read_swanlab,
}


@pytest.fixture(params=READERS)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a tracker's name; its library is installed, and knows no server and no home folder."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    return str(request.param)


@pytest.fixture
def config(name: str, tmp_path: Path) -> Config:
    options = {"wandb": "{mode: offline}", "mlflow": f"{{tracking_uri: 'sqlite:///{tmp_path}/mlflow.db'}}"}
    options |= {"trackio": "{}", "swanlab": "{mode: offline}"}
    return load_config(
        None,
        [
            *("model.path=m", "prompts.path=p", "reward.path=r", f"output_dir={tmp_path / 'run'}"),
            *(f"tracking.trackers=[{name}]", f"tracking.options={{{name}: {options[name]}}}", "tracking.project=films"),
            *("tracking.only_checkpointed=true", "tracking.num_samples=1", "tracking.samples_every_steps=4"),
            "tracking.close_timeout_s=120",
        ],
    )


def write_samples(path: Path) -> None:
    rows = {"sample_id": [0], "prompt": ["p"], "response": [HOSTILE], "response_ids": [[1]], "score": [0.5]}
    rows |= {"kl": [[0.5]], "advantages": [[1.0]], "finish_reason": ["stop"]}
    schema = pa.schema([LEARNED_SCHEMA.field(name) for name in rows], metadata=LEARNED_SCHEMA.metadata)
    pq.write_table(pa.table(rows, schema), path)


def write_steps(log: MetricsLog, first: int, last: int, factor: float) -> Iterator[None]:
    for step in range(first, last):
        odd = float("nan") if step == 1 else 0.1 * step * factor
        log.write(step, {"score/mean": step / 3 * factor, "eval/pass@4": odd, "learner/tokens": float(step)})
        yield


def test_a_store_holds_the_log_after_a_kill_and_a_resume(name: str, config: Config, tmp_path: Path) -> None:
    folder = RunFolder.open(config.output_dir)
    folder.write_config(config)
    write_samples(folder.trajectory_file(0))
    events: list[Event] = []
    with MetricsLog(folder.path) as log:
        tracking = Tracking(config, folder, events.append)
        tracking.start()
        list(write_steps(log, 0, 3, 1.0))
        (folder.checkpoints / "step-00003").mkdir(parents=True)
        list(write_steps(log, 3, 5, 1.0))
        ends_at = time.monotonic() + 120
        while Sent.read(state_file(folder, name)).steps < 3:
            assert time.monotonic() < ends_at, state_file(folder, name).with_suffix(".log").read_text()
            time.sleep(0.1)
        os.killpg(tracking._processes[0]._process.pid, signal.SIGKILL)
        tracking._processes[0]._process.wait(30)
    folder.report.write_text("<p>a report</p>")
    with MetricsLog(folder.path) as log, track(config, folder, events.append):
        log.resume(3)
        list(write_steps(log, 3, 6, 2.0))
    output = state_file(folder, name).with_suffix(".log").read_text()
    assert [event.message for event in events] == [], output
    rows, sent_config = READERS[name](tmp_path, (folder.tracking / "run_id").read_text().strip())
    logged = {int(row.pop("step")): row for row in read_steps(folder.path)}
    rows = {step: {key: row[key] for key in row if not key.startswith("samples")} for step, row in rows.items()}
    assert rows == {step: {key: row[key] for key in row if row[key] == row[key]} for step, row in logged.items()}
    assert sorted(rows) == [0, 1, 2, 3, 4, 5] and "learning_rate" in sent_config
