"""Train one task in several ways, for several seeds, and compare what each reached: a table and a picture.

    python -m benchmarks.variants algorithms [--seeds 3] [section.option=value ...]
    python -m benchmarks.variants algorithms --time

Each run is one `ppo-ray train`, one after another, below runs/variants/. A run that was interrupted goes on, and one
that ended is not made again; its checkpoints are removed. Its figures are kept in a file of JSON lines (`--figures`),
from which table and picture are made: runs that the file knows need not be on this machine. benchmarks/figures/ keeps
such files. `--time` measures the seconds per step of each way in short runs of their own, for which the machine should
do nothing else; the others may share it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_ray.run.log import read_steps

_GRPO = "configs/imdb_grpo.yaml"
_GSPO = (
    "ppo.policy_loss=gspo",
    "ppo.clip_range=0.03",  # a hundred times the paper's: the mean of ten tokens varies more than that of thousands
    "ppo.clip_range_high=0.04",
    "ppo.loss_aggregation=sequence_mean",
)
VARIANTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "algorithms": {
        "PPO (gae)": ("configs/imdb.yaml",),
        "GRPO": (_GRPO,),
        "Dr.GRPO": (_GRPO, "ppo.advantages=dr_grpo", "ppo.loss_aggregation=sequence_sum", "ppo.loss_length=16"),
        "RLOO": (_GRPO, "ppo.advantages=rloo"),
        "REINFORCE++": (_GRPO, "ppo.advantages=reinforce", "rollout.responses_per_prompt=1"),
        "REINFORCE++-baseline": (_GRPO, "ppo.advantages=reinforce_baseline"),
        "GSPO": (_GRPO, *_GSPO),
        "CISPO": (_GRPO, "ppo.policy_loss=cispo", "ppo.clip_range_high=0.28"),
    },
    "lora": {"all weights": ("configs/imdb.yaml",), "adapters": ("configs/imdb_lora.yaml",)},
    "overlap": {
        "one after another": ("configs/imdb_overlap.yaml", "rollout.max_staleness=0"),
        "overlapped": ("configs/imdb_overlap.yaml",),
    },
}
"""By the name of a comparison: its ways, each a config and what is changed in it."""

Run = Mapping[str, Any]
"""`way`, `seed`, the held-out scores `before` and `after`, and of each step `score`, `kl`, `mismatch`; or `way`
and `step_s`, the seconds of a step, where `seed` is None."""
_COLOURS = ("#2a6f97", "#d1495b", "#3a7d44", "#8e5ea2", "#c77d0a", "#17a2b8", "#8d5524", "#666666")
_TIMED = 7  # steps of a run that is timed; the first is not counted
_SMOOTH = 5  # steps that a point of a line is the mean of, and the last ones that the table speaks of


def train(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run one training as a user would, or go on with it, and return its figures."""
    if not (folder / "evaluation_after.json").is_file():
        options = [f"output_dir={folder}", "resume=auto"]
        subprocess.run([sys.executable, "-m", "ppo_ray", "train", *command, *options], check=True)
    before, after = (json.loads((folder / f"evaluation_{when}.json").read_text()) for when in ("before", "after"))
    names = {"score": "score/mean", "kl": "kl/per_sequence", "mismatch": "mismatch/kl"}
    steps = read_steps(folder)
    figures = {figure: [round(step[name], 6) for step in steps] for figure, name in names.items()}
    _drop_checkpoints(folder)
    return {"before": before["mean_score"], "after": after["mean_score"], **figures}


def time_steps(command: Sequence[str], folder: Path) -> float:
    """Return the seconds of a step, the median of a short training without evaluations."""
    options = [f"output_dir={folder}", "resume=never", f"steps={_TIMED}", "evaluation.num_prompts=0"]
    subprocess.run([sys.executable, "-m", "ppo_ray", "train", *command, *options], check=True)
    _drop_checkpoints(folder)
    return statistics.median(step["time/step_s"] for step in read_steps(folder)[1:])


def _drop_checkpoints(folder: Path) -> None:
    """Remove what a finished run would go on from: 1.5 GiB per checkpoint of the demo's model."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def tabulate(runs: Sequence[Run], seconds: Mapping[str, float]) -> str:
    """Make a Markdown table with one row per way: means over its seeds, and of the last steps."""
    lines = [
        f"| | held-out score, by seed | gain, mean | KL, last {_SMOOTH} steps | seconds per step |",
        "|---|---|--:|--:|--:|",
    ]
    for way, made in _by_way(runs).items():
        scores = ", ".join(f"{run['before']:.2f} -> {run['after']:.2f}" for run in made)
        gain = statistics.fmean(run["after"] - run["before"] for run in made)
        kl = statistics.fmean(statistics.fmean(run["kl"][-_SMOOTH:]) for run in made)
        step_s = f"{seconds[way]:.1f}" if way in seconds else ""
        lines.append(f"| {way} | {scores} | {gain:+.2f} | {kl:.2f} | {step_s} |")
    return "\n".join(lines)


def draw(runs: Sequence[Run], seconds: Mapping[str, float], path: Path) -> None:
    """Draw each batch's mean score against the KL to the reference, and against the seconds of the steps so far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    by_kl, by_seconds = figure.subplots(1, 2, sharey=True)
    for (way, made), colour in zip(_by_way(runs).items(), _COLOURS, strict=False):
        scores, kl = (_smooth(_mean([run[name] for run in made])) for name in ("score", "kl"))
        by_kl.plot(kl, scores, color=colour, lw=1.8, label=way)
        by_kl.plot(kl[-1:], scores[-1:], color=colour, marker="o", ms=5)
        if way in seconds:
            ends = [seconds[way] * (step + 1) for step in range(len(scores))]
            by_seconds.plot(ends, scores, color=colour, lw=1.8, label=way)
            for run in made:
                by_seconds.plot(ends, _smooth(run["score"]), color=colour, lw=0.6, alpha=0.35)
    by_kl.set_xlabel("KL to the reference, nats per sequence")
    by_seconds.set_xlabel("seconds of the steps so far")
    by_kl.set_ylabel(f"mean score of a batch, mean of {_SMOOTH} steps")
    by_kl.legend(frameon=False, fontsize=8)
    for axes, title in ((by_kl, "score for its distance"), (by_seconds, "score for its time; thin: each seed")):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _by_way(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run["way"]].append(run)
    return found


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=False)]


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, end - _SMOOTH) : end]) for end in range(1, len(values) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these ways alone")
    parser.add_argument("--time", action="store_true", help="measure the seconds per step of each way instead")
    parser.add_argument("--figures", type=Path, help="a file of JSON lines, one per run, read and added to")
    parser.add_argument("--picture", type=Path, help="the PNG to draw")
    parser.add_argument("overrides", nargs="*", help="section.option=value, for all runs")
    given = parser.parse_intermixed_args()
    root = Path("runs/variants").absolute()
    root.mkdir(parents=True, exist_ok=True)
    ways = VARIANTS[given.comparison]
    file = given.figures or root / f"{given.comparison}.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for seed in [None] if given.time else range(given.seeds):
        for way in given.only or ways:
            if any((line["way"], line["seed"]) == (way, seed) for line in found):
                continue
            (config, *changes), name = ways[way], "-".join(way.split())
            command = [config, *changes, *given.overrides]
            if seed is None:
                figures: dict[str, Any] = {"step_s": time_steps(command, root / f"{name}-timed")}
            else:
                figures = train([*command, f"seed={seed}"], root / f"{name}-{seed}")
            found.append({"way": way, "seed": seed, **figures})
            with file.open("a") as lines:
                lines.write(json.dumps(found[-1]) + os.linesep)
    order, seconds = list(ways), {line["way"]: line["step_s"] for line in found if line["seed"] is None}
    runs = [line for line in found if line["seed"] is not None]
    runs.sort(key=lambda run: (order.index(run["way"]), run["seed"]))
    print(tabulate(runs, seconds))
    picture = given.picture or file.with_suffix(".png")
    draw(runs, seconds, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
