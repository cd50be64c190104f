"""Prometheus and Grafana ask for what there is."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

from ppo_ray.run.gauges import EVENTS, gauge_name
from tests.figures import FIGURES

CLUSTER = Path(__file__).parents[2] / "cluster"
DASHBOARD: dict[str, Any] = json.loads((CLUSTER / "grafana" / "ppo_ray.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_every_metric_is_one_that_ray_or_the_run_exports() -> None:
    asked = {name for query in QUERIES for name in re.findall(r"\bray_\w+", query)}
    asked |= set(re.findall(r"\bray_\w+", json.dumps(DASHBOARD["templating"])))
    ours = {name for name in asked if name.startswith("ray_ppo_ray_")}
    assert ours <= {f"ray_{gauge_name(figure)}" for figure in FIGURES} | {f"ray_{EVENTS}_total"}
    of_ray = Path(default_dashboard_panels.__file__).read_text()
    assert all(re.search(rf"\b{name}\b", of_ray) for name in asked - ours)
    wanted = "score/mean kl/per_sequence policy/entropy policy/clip_fraction loss/policy loss/value"
    wanted += " mismatch/logprob_mean time/generate_s time/score_s time/learn_s time/sync_s"
    assert {f"ray_{gauge_name(figure)}" for figure in wanted.split()} | {f"ray_{EVENTS}_total"} <= ours


def test_a_figure_outlives_the_seconds_in_which_ray_shows_it() -> None:
    """A page has a step's figures for twenty seconds: a query for the present would find nothing between steps."""
    for query in QUERIES:
        gauges = re.findall(r"(\S*)\bray_ppo_ray_(?!events)\w+\{run=~\"\$run\"\}(\[\S+?\])?", query)
        assert all(before.endswith("last_over_time(") and after == "[$window]" for before, after in gauges)
    (config,) = yaml.safe_load_all((CLUSTER / "prometheus.yml").read_text())
    (monitor,) = yaml.safe_load_all((CLUSTER / "kuberay" / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert config["global"]["scrape_interval"] == endpoint["interval"] == "10s"


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        cells = {(column, line) for column in range(x, x + w) for line in range(y, y + h)}
        assert not cells & taken and x + w <= 24
        taken |= cells


def test_prometheus_reads_rays_list_and_the_operator_the_port_that_kuberay_names() -> None:
    (job,) = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())["scrape_configs"]
    (source,) = job["file_sd_configs"]
    assert source["files"] == ["/tmp/ray/session_latest/prom_metrics_service_discovery.json"]
    monitor = yaml.safe_load((CLUSTER / "kuberay" / "podmonitor.yaml").read_text())
    cluster = yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())
    ports = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in {port["name"] for port in ports}
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
