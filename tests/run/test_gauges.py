"""A run's figures on the metrics page of a real Ray node, as Prometheus reads them."""

import re
import time
import urllib.request

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from ppo_ray.events import Event
from ppo_ray.run.gauges import Gauges, gauge_name
from tests.figures import FIGURES


def page() -> dict[tuple[str, str, str], float]:
    """Return the samples of ours on the node's metrics page by name, run and kind."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (name, labels["run"], labels.get("kind", "")): value
        for name, labels, value, *_ in samples
        if name.startswith("ray_ppo_ray_")
    }


def test_every_figure_has_a_gauge_of_its_own() -> None:
    names = [gauge_name(figure) for figure in FIGURES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"ppo_ray_[a-z_]+", name) for name in names)
    assert gauge_name("kl/per_sequence") == "ppo_ray_kl_per_sequence"


def test_without_ray_nothing_is_exported_and_nothing_fails() -> None:
    gauges = Gauges("run")
    gauges.set({"score/mean": 1.0})
    gauges.count(Event("resumed", "going on"))


def test_what_ray_refuses_ends_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def refuse(self: object, value: float) -> None:
        calls.append(value)
        raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.metrics.Gauge.set", refuse)
    gauges = Gauges("run")
    gauges.set({"score/mean": 1.0, "score/std": 2.0})
    gauges.set({"score/mean": 3.0})
    assert calls == [1.0]
    assert [record.message.split(":")[0] for record in caplog.records] == ["no more figures for Prometheus"]


@pytest.mark.slow
def test_prometheus_sees_the_last_steps_figures_and_all_events(session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gauges = Gauges("café")
    with monkeypatch.context() as before_ray:
        before_ray.setattr(ray, "is_initialized", lambda: False)
        gauges.count(Event("resumed", "going on"))
    gauges.set(dict.fromkeys(FIGURES, 1.0))
    gauges.set({"score/mean": -0.5, "step": 7, "kl/per_token": float("nan")})
    gauges.count(Event("worker_replaced", "rollout-1 was replaced", "rollout-1"))
    gauges.count(Event("worker_replaced", "rollout-0 was replaced", "rollout-0"))
    deadline = time.monotonic() + 90
    while not (seen := page()):
        assert time.monotonic() < deadline, "nothing of ours on the metrics page within 90 s"
        time.sleep(0.5)
    run = r"caf\xe9"
    ones = {(f"ray_{gauge_name(figure)}", run, ""): 1.0 for figure in FIGURES if figure != "kl/per_token"}
    assert seen == ones | {
        ("ray_ppo_ray_score_mean", run, ""): -0.5,
        ("ray_ppo_ray_step", run, ""): 7.0,
        ("ray_ppo_ray_events_total", run, "worker_replaced"): 2.0,
        ("ray_ppo_ray_events_total", run, "resumed"): 1.0,
    }
