"""`ppo-ray assets imdb`: build what is missing, say where everything is."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ppo_ray.assets.cache import AssetName, asset_path, build_once, cache_folder

Advance = Callable[[float], None]


def build_imdb(force: bool = False, console: Console | None = None) -> None:
    """Build the policy, the reward classifier and the prompts of the reference task, each unless it is there.

    Takes about three minutes on two idle cores the first time, and no time after that.

    Args:
        force: build them again.
        console: where to print; the terminal by default.

    Raises:
        AssetError: a package is missing (`pip install 'ppo-ray[demo]'`), the disk is full, or the classifier is
            not good enough.
    """
    console = console or Console()
    seconds: dict[AssetName, float] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name, title, build in _BUILDS:
            task = progress.add_task(title, total=1.0)
            start = time.monotonic()
            advance = functools.partial(progress.advance, task)
            if build_once(asset_path(name), functools.partial(build, advance), force):
                seconds[name] = time.monotonic() - start
            progress.update(task, completed=1.0)
    console.print(_summary(seconds))


def classifier_accuracy() -> float:
    """Return the built classifier's accuracy on its held-out sentences."""
    return float(json.loads((asset_path("classifier") / "accuracy.json").read_text())["accuracy"])


def _prompts(advance: Advance, path: Path) -> None:
    from ppo_ray.assets.prompts import build_prompts

    build_prompts(path)


def _policy(advance: Advance, path: Path) -> None:
    from ppo_ray.assets.policy import build_policy

    build_policy(path)


def _classifier(advance: Advance, path: Path) -> None:
    from ppo_ray.assets.classifier import build_classifier

    build_classifier(path, advance)


_BUILDS: tuple[tuple[AssetName, str, Callable[[Advance, Path], None]], ...] = (
    ("prompts", "prompts: 25,000 IMDB reviews", _prompts),
    ("policy", "policy: SmolLM2-135M", _policy),
    ("classifier", "classifier: MiniLM, fine-tuned", _classifier),
)


def _summary(seconds: dict[AssetName, float]) -> Table:
    table = Table(
        "asset", "what", "size", "built in", title=f"offline assets in {cache_folder()}", title_justify="left"
    )
    names: tuple[AssetName, ...] = ("policy", "classifier", "prompts")
    what = {
        "policy": "SmolLM2, 135M parameters, float32",
        "classifier": f"MiniLM, accuracy {classifier_accuracy():.3f} on 800 held-out sentences",
        "prompts": "25,000 IMDB reviews",
    }
    for name in names:
        path = asset_path(name)
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        built = f"{seconds[name]:.0f} s" if name in seconds else "there already"
        table.add_row(path.name, what[name], f"{size / 1e6:.0f} MB", built)
    return table
