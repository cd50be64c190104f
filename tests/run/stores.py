"""What the offline stores of trackers hold, read without their own code where that is possible."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

from ppo_ray.run.trackers import read_store

Rows = dict[int, dict[str, float]]
"""Figures by step and name."""


def read_wandb(run: Path, home: Path, run_id: str) -> tuple[Rows, str]:
    from wandb.proto import wandb_internal_pb2

    rows: Rows = {}
    config = ""
    for path in sorted(run.glob("tracking/wandb/wandb/offline-run-*/*.wandb")):
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
    return rows, config


def read_mlflow(run: Path, home: Path, run_id: str) -> tuple[Rows, str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    place = client.get_experiment_by_name("films").experiment_id
    (found,) = client.search_runs([place])
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    assert found.data.tags["ppo_ray_run"] == run_id
    rows: Rows = {}
    for name in found.data.metrics:
        for item in client.get_metric_history(found.info.run_id, name):
            row = rows.setdefault(item.step, {})
            assert name not in row, "a figure was sent twice"
            row[name] = item.value
    return {
        step: {name.replace("pass_4", "pass@4"): value for name, value in row.items()} for step, row in rows.items()
    }, str(found.data.params)


def read_trackio(run: Path, home: Path, run_id: str) -> tuple[Rows, str]:
    (path,) = (home / "trackio").glob("films*.db")
    with sqlite3.connect(path) as store:
        found = store.execute("select run_name, step, metrics from metrics").fetchall()
        ((config,),) = store.execute("select config from configs").fetchall()
    assert {name for name, _, _ in found} == {f"{run.name}-{run_id[:6]}"}
    rows = {step: json.loads(metrics) for _, step, metrics in found}
    assert len(rows) == len(found), "a step was sent twice"
    return rows, str(config)


def read_swanlab(run: Path, home: Path, run_id: str) -> tuple[Rows, str]:
    from swanlab.proto.swanlab.record.v1 import record_pb2

    rows: Rows = {}
    paths = sorted(run.glob("tracking/swanlab/run-*/*.swanlab"))
    assert {path.name for path in paths} == {f"run-{run_id}.swanlab"}
    for path in paths:
        for data in read_store(path):
            record = record_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "scalar":
                row = rows.setdefault(record.scalar.step, {})
                assert record.scalar.key not in row, "a figure was sent twice"
                row[record.scalar.key] = record.scalar.value.number
    return rows, "".join(path.read_text() for path in run.glob("tracking/swanlab/run-*/files/config.yaml"))


READERS: dict[str, Callable[[Path, Path, str], tuple[Rows, str]]] = {
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "swanlab": read_swanlab,
}
"""By the tracker's name. Each takes the run's folder, the folder of stores outside it, and the run's id; it returns the
figures without tables of responses (`samples`), and the config as one text."""


def tracker_options(name: str, home: Path) -> str:
    """Return `tracking.options` of a tracker without a server; its store is in the run's folder, or in `home`."""
    options = {"wandb": "{mode: offline}", "mlflow": f"{{tracking_uri: 'sqlite:///{home}/mlflow.db'}}"}
    options |= {"trackio": "{}", "swanlab": "{mode: offline}"}
    return f"{name}: {options[name]}"
