"""Train the same task with and without overlap, for several seeds, and print what each run reached.

    python benchmarks/overlap.py configs/imdb_overlap.yaml --seeds 3 [section.option=value ...]

The config must be one that can overlap; the runs lie below its output_dir and go on where they were.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from ppo_ray.config import load_config

_CHANGE = re.compile(r"held-out mean score ([+-][\d.]+) -> ([+-][\d.]+)")


def train(config: Path, overrides: list[str], output_dir: Path) -> dict[str, float]:
    """Run one training as a user would, and return what it reached."""
    output = output_dir / "output.txt"
    if not output.is_file():
        command = [sys.executable, "-m", "ppo_ray", "train", str(config), *overrides]
        command += [f"output_dir={output_dir}", "resume=auto"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        output.write_text(result.stdout)
    change = _CHANGE.search(output.read_text())
    assert change is not None, f"{output}: no held-out score; is evaluation.num_prompts 0?"
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "event" not in record]

    def lately(name: str) -> float:
        return statistics.fmean(step[name] for step in steps[-10:])  # a batch alone is noisy

    return {
        "held-out before": float(change[1]),
        "after": float(change[2]),
        **{name: lately(name) for name in ("score/mean", "kl/per_sequence", "mismatch/kl")},
        "seconds per step": statistics.median(step["time/step_s"] for step in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("overrides", nargs="*", help="section.option=value, for all runs")
    given = parser.parse_intermixed_args()
    root = Path(load_config(given.config, given.overrides).output_dir)
    reached: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for seed in range(given.seeds):
        for staleness, runs in reached.items():
            options = [*given.overrides, f"seed={seed}", f"rollout.max_staleness={staleness}"]
            runs.append(train(given.config, options, root / f"staleness-{staleness}-seed-{seed}"))
            figures = "  ".join(f"{name} {value:+.4g}" for name, value in runs[-1].items())
            print(f"max_staleness={staleness} seed={seed}: {figures}", flush=True)
    for staleness, runs in reached.items():
        after = [run["after"] for run in runs]
        spread = f", standard deviation {statistics.stdev(after):.3f}" if len(after) > 1 else ""
        print(f"max_staleness={staleness}: mean of {len(after)} seeds {statistics.fmean(after):+.3f}{spread}")


if __name__ == "__main__":
    main()
