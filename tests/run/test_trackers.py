"""The real libraries, offline: what their stores hold after a kill and a resume; what is not installed is skipped."""

import importlib.util
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.events import Event
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.follow import Sent, state_file
from ppo_ray.run.log import MetricsLog, read_steps
from ppo_ray.run.tracking import Tracking, track
from ppo_ray.trajectory import LEARNED_SCHEMA
from tests.run.stores import READERS, tracker_options

HOSTILE = "<script>alert(1)</script>\x00\x1b[31m=1+1\u202e" + "a" * 10_000


def check_samples(name: str, folder: Path) -> None:
    """Check that the table of responses and the report are in a tracker's store."""
    stores = folder / "run" / "tracking" / name
    if name == "wandb":
        tables = list(stores.glob("wandb/offline-run-*/files/media/table/*.json"))  # the killed one's lies there too
        assert {json.loads(table.read_text())["data"][0][3] for table in tables} == {HOSTILE}
        assert len(list(stores.glob("wandb/offline-run-*/files/report.html"))) == 1
    elif name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("films").experiment_id])
        names = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert names == {"config.yaml", "report.html", "samples"}
        table = Path(client.download_artifacts(run.info.run_id, "samples/step-00000.json"))
        assert json.loads(table.read_text())["data"][0][3] == HOSTILE
        assert run.data.params["ppo.learning_rate"] == "1.41e-05"
    elif name == "trackio":
        with sqlite3.connect(next((folder / "trackio").glob("films*.db"))) as store:
            ((first,),) = store.execute("select metrics from metrics where step = 0").fetchall()
        assert HOSTILE[:25] in json.dumps(json.loads(first)["samples"])
    else:
        texts = [path.read_text() for path in stores.glob("run-*/media/text/*.txt")]
        assert texts and all(HOSTILE in text for text in texts)
        assert list(stores.glob("run-*/files/report.html"))


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
    return load_config(
        None,
        [
            *("model.path=m", "prompts.path=p", "reward.path=r", f"output_dir={tmp_path / 'run'}"),
            *(
                f"tracking.trackers=[{name}]",
                f"tracking.options={{{tracker_options(name, tmp_path)}}}",
                "tracking.project=films",
            ),
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
    run_id = (folder.tracking / "run_id").read_text().strip()
    check_samples(name, tmp_path)
    rows, sent_config = READERS[name](folder.path, tmp_path, run_id)
    logged = {int(row.pop("step")): row for row in read_steps(folder.path)}
    rows = {step: {key: row[key] for key in row if not key.startswith("samples")} for step, row in rows.items()}
    assert rows == {step: {key: row[key] for key in row if row[key] == row[key]} for step, row in logged.items()}
    assert sorted(rows) == [0, 1, 2, 3, 4, 5] and "learning_rate" in sent_config
