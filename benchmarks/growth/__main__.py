"""How cost grows: `python -m benchmarks.growth [--quick] [--only batch,length,size,workers] [--output DIR]`.

Measures the learner's update, vLLM's generation, the way of the weights, and the loop over Ray actors, as the batch,
the responses, the model and the number of rollout workers grow; the models' weights are random. Each is held against
its work: operations on tokens that matter for update and generation, bytes for weights, trajectories for workers.
Nothing may grow faster than its work: no point may take more than 1.25 times the seconds per unit of work of any
smaller point. Leaves `growth.json` and `growth.png`; ends with 1 if something grows faster. docs/internals.md says
more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.growth.series import TOLERANCE, Point, Series, draw, say_verdicts, show
from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, ENVIRONMENT

MEASURES = "benchmarks.growth.panels"
PROCESSES = (("batch", "length"), ("size",), ("workers",))
"""The panels, and which of them share a process, and with it the start of an engine."""


def run(panels: Sequence[str], quick: bool) -> list[Series]:
    """Measure panels in a process of their own, in the environment that engines and learners have in a run."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "series.json"
        command = [sys.executable, "-m", MEASURES, *panels, "--output", str(found)]
        environment = os.environ | ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment |= {} if _has_gpu() else CPU_ENVIRONMENT
        if subprocess.run([*command, *(["--quick"] if quick else [])], env=environment).returncode:
            raise SystemExit(f"growth: measuring {' and '.join(panels)} failed; its own words are above")
        return [_series(**one) for one in json.loads(found.read_text())]


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _series(points: list[dict[str, float]], **rest: Any) -> Series:
    return Series(points=[Point(**point) for point in points], **rest)


def record(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Return what is written to the file: every point with its growth, and the verdicts."""
    return [
        {
            "quantity": one.quantity,
            "over": one.panel,
            "unit": one.unit,
            "tolerance": TOLERANCE,
            "points": [vars(point) | {"growth": growth} for point, growth in zip(one.points, one.growth, strict=True)],
            "grows_faster_at": [point.x for point in one.excess],
        }
        for one in series
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and leave figures and plot in the output folder; returns 1 if something grows faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [panel for panels in PROCESSES for panel in panels]
    parser.add_argument("--quick", action="store_true", help="few points, small models, transformers as the engine")
    parser.add_argument("--only", default=",".join(known), help="some of them, with commas: " + ",".join(known))
    parser.add_argument("--output", type=Path, default=Path("runs/growth"), help="folder for figures and plot")
    options = parser.parse_args(argv)
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    options.output.mkdir(parents=True, exist_ok=True)
    console, series = Console(width=100), []
    for panels in PROCESSES:
        if chosen := [panel for panel in panels if panel in wanted]:
            console.print(f"measuring {' and '.join(chosen)}", highlight=False)
            measured = run(chosen, options.quick)
            show(measured, console)
            series += measured
    say_verdicts(series, console)
    (options.output / "growth.json").write_text(json.dumps(record(series), indent=1))
    draw(series, options.output / "growth.png")
    return int(any(one.excess for one in series))


if __name__ == "__main__":
    sys.exit(main())
