"""The report of a run: one HTML page that needs no network and no script, for mail and papers."""

import importlib.resources
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_ray import __version__, atomic
from ppo_ray.errors import InputError, first_line
from ppo_ray.events import escape_controls
from ppo_ray.run.progress import format_duration
from ppo_ray.run.record import PANELS, Panel, RunRecord

_MOST_POINTS = 500  # of a line; a longer one is drawn as means of neighbours
_MOST_ROWS, _LONGEST_TEXT = 200, 1200  # of a table; characters of a cell
_NUM_SAMPLES = 5
_SMOOTH = 5  # steps that a running mean is made of
_COLOURS = {
    "#0000a1": "accent",
    "#0000a2": "muted",
    "#0000a3": "line",
    "#0000a4": "good",
    "#0000a5": "held",
    "#0000a6": "event",
}
"""What the charts are drawn in, and the colour of the page's style that takes its place: light or dark."""
_ACCENT, _MUTED, _LINE, _GOOD, _HELD, _EVENT = _COLOURS


def write_report(record: RunRecord, path: Path) -> None:
    """Write a run's report, whole or not at all.

    Args:
        record: of the run, finished or not.
        path: of the HTML file.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        atomic.write_text(path, make_report(record))
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written: {error.strerror}") from error


def make_report(record: RunRecord) -> str:
    """Return a run's report as HTML; texts of models and files can neither break nor format it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": _show_text, "number": _show_number, "option": _show_option}
    template = importlib.resources.files("ppo_ray.run").joinpath("report.html").read_text(encoding="utf-8")
    notes = list(record.notes)
    samples = _pick_samples(record, notes)
    seconds = [metrics["time/step_s"] for metrics in record.steps if metrics.get("time/step_s") is not None]
    return environment.from_string(template).render(
        record=record,
        name=record.folder.path.name,
        version=__version__,
        charts=list(_draw_charts(record)),
        unhealthy=record.find_unhealthy(),
        changes=record.find_changes()[:_MOST_ROWS],
        events=record.events[-_MOST_ROWS:],
        held_out=record.find_held_out(),
        pairs=_pair_held_out(record),
        samples=samples,
        actors=[_describe_actor(actor) for actor in record.find_actors()][:_MOST_ROWS],
        notes=notes,
        duration=format_duration(sum(seconds)) if seconds else None,
    )


def _describe_actor(actor: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table of actors shows of one: seconds of its part, memory in GiB; what it has not is missing."""
    kind = actor["name"].rpartition("-")[0]
    part = {"rollout": "generate", "reward": "score", "learner": "learn"}.get(kind, "")
    columns = {"seconds": f"time/{part}_s", "sync": "time/sync_s", "resident": f"memory/{kind}_peak_gib"}
    columns |= {"allocated": f"memory/{kind}_gpu_gib", "reserved": f"memory/{kind}_gpu_reserved_gib"}
    return {"name": actor["name"], "host": actor.get("host"), **{key: actor.get(name) for key, name in columns.items()}}


def _show_text(value: object) -> str:
    """Write a text with its hidden characters as escapes, cut where it is long."""
    text = str(value)
    more = f" … ({len(text):,} characters)" if len(text) > _LONGEST_TEXT else ""
    return escape_controls(text[:_LONGEST_TEXT]) + more


def _show_number(value: Any) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _show_option(value: Any) -> str:
    """Write an option's value; of a nested one only what is set."""
    if value is None:
        return "–"
    if isinstance(value, list):
        value = [
            {key: part for key, part in item.items() if part not in (None, False, [])}
            if isinstance(item, dict)
            else item
            for item in value
        ]
    return _show_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _pair_held_out(record: RunRecord) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    if not record.before or not record.after:
        return []
    return list(zip(record.before["samples"], record.after["samples"], strict=False))[:_MOST_ROWS]


def _pick_samples(record: RunRecord, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the best and the worst scored responses of the newest step that can be read, and those with most KL."""
    for step in reversed(record.folder.list_steps()):
        try:
            rows = record.folder.read_step(step, ["step", "prompt", "response", "score", "kl"]).to_pylist()
        except Exception as error:  # whatever the file holds; its libraries have no common error
            name = record.folder.trajectory_file(step).name
            notes.append(f"{name} cannot be read and is left out: {first_line(error)}")
            continue
        for row in rows:
            row["kl"] = math.fsum(row["kl"]) if row.get("kl") else None
        scored = sorted((row for row in rows if row["score"] is not None), key=lambda row: row["score"], reverse=True)
        far = sorted((row for row in scored if row["kl"] is not None), key=lambda row: row["kl"], reverse=True)
        picked = {
            "best scored": scored[:_NUM_SAMPLES],
            "worst scored": scored[_NUM_SAMPLES:][-_NUM_SAMPLES:][::-1],
            "farthest from the reference": far[:_NUM_SAMPLES],
        }
        return {title: some for title, some in picked.items() if some}
    return {}


def _draw_charts(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Yield each chart that has a value: `panel`, `svg`, `last`, and in how many steps it was `outside` its range."""
    import matplotlib

    outside = {item["name"]: len(item["steps"]) for item in record.find_unhealthy()}
    more = [
        Panel("Policy", name, (name,), "", is_log="ratio" in name)
        for name in outside
        if all(name not in panel.names for panel in PANELS)
    ]
    style = {"svg.fonttype": "none", "svg.hashsalt": "ppo_ray", "path.simplify": True}
    with matplotlib.rc_context(style):
        for panel in (*PANELS, *more):
            values = [metrics.get(panel.names[0]) for metrics in record.steps]
            if any(value is not None for value in values):
                last = next(value for value in reversed(values) if value is not None)
                svg = _draw_chart(record, panel, values)
                yield {"panel": panel, "svg": svg, "last": last, "outside": outside.get(panel.names[0], 0)}


def _draw_chart(record: RunRecord, panel: Panel, values: Sequence[float | None]) -> Any:
    """Draw one figure over the steps: its healthy range, held-out values, events."""
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(4.2, 1.75))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.13, 0.16, 0.85, 0.8))
    axes.patch.set_visible(False)
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    numbers = [math.nan if value is None or (panel.is_log and value <= 0) else float(value) for value in values]
    steps, known = _thin([float(metrics["step"]) for metrics in record.steps], numbers)
    axes.plot(steps, known, color=_ACCENT, lw=0.8, alpha=0.35)
    axes.plot(steps, _smooth(known), color=_ACCENT, lw=1.6)
    for name in panel.names[1:]:
        held = [(step, figures[name]) for step, figures in record.find_held_out() if name in figures]
        if held:
            axes.plot(*zip(*held, strict=True), color=_HELD, lw=0.8, ls=":", marker="D", ms=4)
    low, high = axes.get_ylim()
    healthy = record.health.ranges.get(panel.names[0])
    if healthy is not None:
        axes.axhspan(max(healthy.low, low), min(healthy.high, high), color=_GOOD, alpha=0.1, lw=0)
        axes.set_ylim(low, high)
    for event in record.events:
        axes.axvline(event["step"], color=_EVENT, lw=0.9, ls="--")
    axes.grid(axis="y", color=_LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    written = io.StringIO()
    figure.savefig(
        written, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    for sentinel, name in _COLOURS.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    return Markup(svg)  # it holds numbers alone


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Join neighbours of a line that is longer than what can be seen."""
    width = math.ceil(len(steps) / _MOST_POINTS) or 1
    groups = [range(start, min(start + width, len(steps))) for start in range(0, len(steps), width)]
    return [steps[group[0]] for group in groups], [_mean([values[index] for index in group]) for group in groups]


def _smooth(values: Sequence[float]) -> list[float]:
    half = _SMOOTH // 2
    return [
        _mean(values[max(index - half, 0) : index + half + 1]) if math.isfinite(value) else math.nan
        for index, value in enumerate(values)
    ]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
