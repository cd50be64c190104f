"""Compare ppo_ray with TRL 0.11.3, in one run, arm after arm: `make benchmark`, or `python -m benchmarks.compare`.

docs/internals.md says what is measured and how. A benchmark that was cut off goes on with the same --output.
"""

import argparse
import platform
import shutil
import signal
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.compare import findings, picture, report
from benchmarks.compare.arms import ARMS, ArmRun
from benchmarks.compare.machine import Machine
from benchmarks.compare.ours import SHAPES
from benchmarks.compare.rounds import Round
from benchmarks.compare.settings import Settings, code_digest
from benchmarks.flops import DecoderShape
from ppo_ray.errors import PPORayError


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="notebook", help="lengths of prompts and responses")
    sizes = ", ".join(f"{shape.batch_size} for {name}" for name, shape in SHAPES.items())
    parser.add_argument("--batch-size", type=int, default=0, help=f"samples per step; default: {sizes}")
    steps = ", ".join(f"{shape.steps} for {name}" for name, shape in SHAPES.items())
    parser.add_argument(
        "--steps", type=int, default=0, help=f"of each run, the first of which is in no time; default: {steps}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="each runs all arms, with a seed of its own")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first round; each later round has the next")
    parser.add_argument("--threads", type=int, default=2, help="that every phase of every arm may use")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=None, help="folder; default: runs/benchmark/, shape and time")
    parser.add_argument("--fresh", action="store_true", help="remove what is in the folder")
    parser.add_argument("overrides", nargs="*", help="section.option=value, for ppo_ray alone")
    given = parser.parse_intermixed_args()
    given.batch_size = given.batch_size or SHAPES[given.shape].batch_size
    given.steps = given.steps or SHAPES[given.shape].steps
    if given.steps < 2 or min(given.batch_size, given.rounds, given.threads) < 1:
        parser.error("--steps must be at least 2, as the first is in no time; the others at least 1")
    return given


def run_all(settings: Settings, folder: Path, console: Console) -> tuple[dict[str, list[ArmRun]], list[Machine]]:
    """Run all rounds, or what is missing of them."""
    found: dict[str, list[ArmRun]] = {arm: [] for arm in settings.arms}
    machines: list[Machine] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=console, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=settings.rounds * len(settings.arms) * settings.steps)
        for number in range(settings.rounds):
            round_ = Round(settings, number, folder / f"round-{number}")
            progress.update(task, description="the machine")
            machines.append(round_.machine())
            for arm in round_.arms:
                done = sum(len(run.steps) for runs in found.values() for run in runs)
                tell = partial(_tell, progress, task, done)
                progress.update(task, description=f"round {number}, {ARMS[arm]}", completed=done)
                run = round_.run(arm, tell)
                found[arm].append(run)
                tell(settings.steps)
                seconds = sum(step.total_s for step in run.steps) / len(run.steps)
                console.print(f"round {number}, {ARMS[arm]}: {seconds:.1f} s per step, {run.peak_mib:.0f} MiB at most")
    return found, machines


def _tell(progress: Progress, task: TaskID, before: int, steps: int) -> None:
    progress.update(task, completed=before + steps)


def about(settings: Settings) -> dict[str, Any]:
    """Say what was compared, and on what."""
    return {
        "settings": vars(settings),
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "processor": processor(), "python": platform.python_version()},
    }


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(given: argparse.Namespace, console: Console) -> None:
    """Run what is missing, and report on all."""
    folder = given.output or Path("runs/benchmark") / f"{given.shape}-{datetime.now():%Y-%m-%d-%H%M%S}"
    folder = folder.resolve()
    if given.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    settings = Settings(
        shape=given.shape,
        batch_size=given.batch_size,
        steps=given.steps,
        rounds=given.rounds,
        first_seed=given.first_seed,
        threads=given.threads,
        arms=given.arms,
        overrides=given.overrides,
        code=code_digest(),
    )
    settings.claim(folder)
    console.print(f"results are kept in {folder}; goes on with --output {folder}", soft_wrap=True, highlight=False)
    rounds, machines = run_all(settings, folder, console)
    config = Round(settings, 0, folder / "round-0").config
    model = Path(config.model.path)
    task = findings.Task(
        shape=DecoderShape.read(model),
        epochs=config.ppo.epochs,
        weight_bytes=(model / "model.safetensors").stat().st_size,
        copies=1 + config.rollout.workers,
    )
    found = findings.find(rounds, machines, task)
    report.show(found, machines, console, folder / "report.md")
    report.write(found, rounds, machines, about(settings), folder / "report.json")
    picture.draw(found, rounds, folder / "report.png")
    console.print(f"{folder}: report.md, report.json, report.png", soft_wrap=True, highlight=False)


def main() -> None:
    """Compare; our own errors are a message, and whatever ends the benchmark ends the arm that is under way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        compare(parse(), Console(width=None if sys.stdout.isatty() else 120))
    except PPORayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
