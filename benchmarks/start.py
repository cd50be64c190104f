"""Seconds of short commands, by part and by process: `python -m benchmarks.start [COMMAND ...] [--rounds 3]`.

Two steps of the toy task with each engine, and `plan`, `check` and `evaluate` of it: what they take is start and end.
The best of the rounds is shown, because other work on the machine only adds. Needs `ppo-ray assets toy`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

CONFIG = Path(__file__).parents[1] / "configs" / "toy.yaml"
TRAIN = ("train", str(CONFIG), "steps=2", "output_dir={folder}/run")
COMMANDS = {
    "train (transformers)": TRAIN,
    "train (vLLM)": (*TRAIN, "rollout.engine=vllm", "rollout.kv_cache_mib=64"),
    "check": ("check", str(CONFIG)),
    "evaluate": ("evaluate", str(CONFIG)),
    "plan": ("plan", str(CONFIG)),
}
PARTS = {
    "inputs checked": r"^a response ends with",
    "engines ready": r"x rollout \(.* ready",
    "learner ready": r"^learner ready",
    "first step": r"^step 0 ",
    "second step": r"^step 1 ",
    "last evaluation": r"^after [1-9]\d* steps",
}
"""What ends each part of a training run: a line that it prints."""
PROCESSES = {
    r"ppo_ray (train|check|evaluate|plan)": "driver",
    r"ppo_ray.actors.fork_server": "imports for workers",
    r"ray::RolloutWorker": "rollout worker",
    r"ray::RewardWorker": "reward worker",
    r"ray::LearnerWorker": "learner",
}
POLL_S = 0.05


@dataclass
class Timing:
    """What one run of a command took."""

    wall_s: float
    cpu_s: dict[str, float]
    """Processor time by process."""
    parts: dict[str, float]
    """Seconds from the beginning to the end of each part."""


def measure(arguments: tuple[str, ...]) -> Timing:
    """Run a command of `ppo-ray`; raises `CalledProcessError` if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "ppo_ray", *(argument.format(folder=folder) for argument in arguments)]
        with log.open("w") as file:
            began = time.monotonic()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        used: dict[int, tuple[str, float]] = {}
        parts: dict[str, float] = {}
        while process.poll() is None:
            for part, pattern in PARTS.items():
                if part not in parts and re.search(pattern, log.read_text(), re.MULTILINE):
                    parts[part] = time.monotonic() - began
            used |= _read_processor_time(process.pid)
            time.sleep(POLL_S)
        wall_s = time.monotonic() - began
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, log.read_text())
    cpu_s: dict[str, float] = {}
    for name, seconds in used.values():
        cpu_s[name] = cpu_s.get(name, 0.0) + seconds
    return Timing(wall_s, cpu_s, parts)


def _read_processor_time(pid: int) -> dict[int, tuple[str, float]]:
    """Return the kind and the processor time of a process and of all below it, by process id."""
    found = {}
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for process in family:
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        if not title:  # it has ended
            continue
        name = next((name for pattern, name in PROCESSES.items() if re.search(pattern, title)), "Ray's own")
        found[process.pid] = (name, times.user + times.system)
    return found


def show(timings: dict[str, Timing], console: Console) -> None:
    """Print seconds of each command by part, and processor time by process."""
    for title, pick in (("seconds from the beginning", "parts"), ("seconds of processor time", "cpu_s")):
        names = dict.fromkeys(name for timing in timings.values() for name in getattr(timing, pick))
        table = Table(title, *timings, title_justify="left")
        for name in names:
            table.add_row(
                name,
                *(f"{value:.1f}" if (value := getattr(timing, pick).get(name)) else "" for timing in timings.values()),
            )
        if pick == "parts":
            table.add_row("the end", *(f"{timing.wall_s:.1f}" for timing in timings.values()))
        else:
            table.add_row("all", *(f"{sum(timing.cpu_s.values()):.1f}" for timing in timings.values()))
        console.print(table)


def main() -> None:
    """Measure the commands that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of: {', '.join(COMMANDS)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if unknown := [name for name in options.commands if name not in COMMANDS]:
        parser.error(f"no such command: {unknown[0]}; there are: {', '.join(COMMANDS)}")
    chosen = {name: COMMANDS[name] for name in options.commands or COMMANDS}
    timings = {
        name: min((measure(arguments) for _ in range(options.rounds)), key=lambda timing: timing.wall_s)
        for name, arguments in chosen.items()
    }
    show(timings, Console(width=max(120, shutil.get_terminal_size().columns)))


if __name__ == "__main__":
    main()
