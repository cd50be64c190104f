"""One trajectory token by token, and the spread of a step's figures."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ppo_ray.errors import InputError
from ppo_ray.run.folder import RunFolder
from ppo_ray.trajectory import LEARNED_FIELDS, lengths, ragged
from ppo_ray.view.index import read_messages

FIGURES = ("rollout_logprobs", *LEARNED_FIELDS)
"""Columns with a figure per token of the response."""
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_LARGEST_TOKENIZER = 256 << 20  # bytes
_LARGEST_INTEGER = 2**53  # that a browser's numbers hold exactly; larger ones, as seeds, become text
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Of a distribution, as a share of what lies below."""
SPREADS = {
    "score": ("score",),
    "kl": ("kl",),
    "advantages": ("advantages",),
    "log_ratio": ("old_logprobs", "ref_logprobs"),
    "rollout_logprobs": ("rollout_logprobs",),
    "values": ("values",),
    "returns": ("returns",),
    "tokens": ("response_ids",),
}
"""Figures whose distribution can be asked for, each with the columns that it is made of. `log_ratio` is that of the
policy before the update to the reference, per token; `tokens` and `score` are per response, all others per token."""


class TokenTexts:
    """The text of each token, by the run's own tokenizer; nothing where there is none on this machine."""

    def __init__(self, run: Path, model: str | None) -> None:
        """Look for a tokenizer's files: in the run's checkpoints, in the model's folder, in the hub's cache.

        Args:
            run: the run's folder.
            model: `model.path` of the run: a folder, or a name on the hub.
        """
        found = (_find_files(run, model, name) for name in (_TOKENIZER, _TOKENIZER_CONFIG))
        self._found = next((path for paths in found for path in paths if _is_usable(path)), None)
        self._split: Callable[[Sequence[int]], list[str]] | None = None

    def decode(self, ids: Sequence[int]) -> list[str] | None:
        """Return what each token adds to the text; empty for a token that is a part of a character only.

        None: there is no tokenizer.
        """
        if self._found is None:
            return None
        try:
            self._split = self._split or (_load_fast if self._found.name == _TOKENIZER else _load_slow)(self._found)
            return self._split(ids)
        except Exception:  # the libraries raise nothing narrower; the ids are shown instead
            return None


def _load_fast(path: Path) -> Callable[[Sequence[int]], list[str]]:
    """Return what splits ids into texts by `tokenizer.json`."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    tokenizer = Tokenizer.from_file(str(path))

    def split(ids: Sequence[int]) -> list[str]:
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(tokenizer, token) or "" for token in ids]

    return split


def _load_slow(path: Path) -> Callable[[Sequence[int]], list[str]]:
    """Return what splits ids into texts by a tokenizer of transformers, which has no `tokenizer.json`.

    Raises:
        ValueError: it needs code of its own, which is not run; without it transformers may make another tokenizer.
    """
    from transformers import AutoTokenizer

    if "auto_map" in json.loads(path.read_text(encoding="utf-8")):
        raise ValueError("a tokenizer with code of its own")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def split(ids: Sequence[int]) -> list[str]:
        texts, known, shown = [], 0, 0  # tokens before `known` are not looked at again; those before `shown` have texts
        for end in range(1, len(ids) + 1):
            before, after = decode(ids[known:shown]), decode(ids[known:end])
            is_whole = len(after) > len(before) and not after.endswith("\N{REPLACEMENT CHARACTER}")
            texts.append(after[len(before) :] if is_whole else "")
            known, shown = (shown, end) if is_whole else (known, shown)
        return texts

    return split


def _find_files(run: Path, model: str | None, name: str) -> Iterator[Path]:
    """Yield where a tokenizer's file may be, the run's own first."""
    yield from sorted((run / "checkpoints").glob(f"step-*/{name}"))
    if model:
        yield Path(model) / name
        if not Path(model).is_absolute() and model.count("/") <= 1:
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.errors import HFValidationError

            try:
                cached = try_to_load_from_cache(model, name)
            except HFValidationError:
                return
            if isinstance(cached, str):
                yield Path(cached)


def _is_usable(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= _LARGEST_TOKENIZER
    except (OSError, ValueError):
        return False


def open_sample(folder: RunFolder, step: int, row: int, texts: TokenTexts, offset: int, limit: int) -> dict[str, Any]:
    """Return one trajectory with the figures of some of its tokens.

    Args:
        folder: of the run.
        step: of the trajectory.
        row: of the step's file.
        texts: the run's tokens.
        offset: first token of the response to be returned.
        limit: number of tokens to be returned.

    Returns:
        `facts` by column; `prompt`; `response`; `messages`, where the prompt is a conversation; `tokens`: `ids`,
        `texts` (None without a tokenizer) and `figures`, a list for each of `FIGURES` or None; `num_tokens`.

    Raises:
        InputError: there is no such row.
        OSError, pa.ArrowException: the file cannot be read.
    """
    table = folder.read_step(step)
    if not 0 <= row < table.num_rows:
        raise InputError(f"step {step} has no row {row}: it has {table.num_rows}")
    found = table.slice(row, 1).to_pylist()[0]
    ids = found.pop("response_ids")
    shown = slice(offset, offset + limit)
    figures = {name: found.pop(name, None) for name in FIGURES}
    found["num_prompt_tokens"] = len(found.pop("prompt_ids"))
    tokens = {
        "offset": offset,
        "ids": ids[shown],
        "texts": texts.decode(ids[: shown.stop]),
        "figures": {name: _finite(values[shown]) if values is not None else None for name, values in figures.items()},
    }
    if tokens["texts"] is not None:
        tokens["texts"] = tokens["texts"][shown]
    return {
        "prompt": found.pop("prompt"),
        "response": found.pop("response"),
        "messages": read_messages(found.pop("messages", None)),
        "facts": _plain({name: value for name, value in found.items() if value is not None}),
        "num_tokens": len(ids),
        "tokens": tokens,
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    """Write figures with seven digits, as float32 has them; None for what is not finite."""
    return [float(f"{value:.7g}") if value is not None and math.isfinite(value) else None for value in values]


def _plain(value: Any) -> Any:
    """Make JSON of what a column may hold: nested columns stay, what JSON has no form for becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _finite([value])[0]
    is_exact = isinstance(value, int) and abs(value) <= _LARGEST_INTEGER
    return value if value is None or is_exact or isinstance(value, str) else str(value)


class Spreads:
    """The distributions of a run's figures over its steps; each file is read once per figure."""

    def __init__(self, folder: RunFolder) -> None:
        """Know nothing yet of the run in a folder."""
        self._folder = folder
        self._known: dict[tuple[int, str], tuple[tuple[int, int], list[float] | None]] = {}

    def quantiles(self, step: int, name: str) -> list[float] | None:
        """Return the quantiles of a figure in a step, as `QUANTILES` has them; None where there is no value."""
        stat = self._folder.trajectory_file(step).stat()
        stamp = stat.st_mtime_ns, stat.st_size
        known = self._known.get((step, name))
        if known is None or known[0] != stamp:
            values = read_values(self._folder, step, name)
            quantiles = [float(value) for value in np.quantile(values, QUANTILES)] if values.size else None
            known = self._known[step, name] = stamp, quantiles
        return known[1]


def read_values(folder: RunFolder, step: int, name: str) -> np.ndarray:
    """Return all finite values of a figure in a step, float64.

    Raises:
        InputError: no such figure.
        OSError, pa.ArrowException: the file cannot be read.
    """
    if name not in SPREADS:
        raise InputError(f"{name}: no such figure; there are {', '.join(SPREADS)}")
    table = folder.read_step(step, SPREADS[name])
    if name == "score":
        values = table.column("score").to_numpy()
    elif name == "tokens":
        values = np.array([len(ids) for ids in ragged(table, "response_ids")])
    else:
        first, *second = (np.concatenate(ragged(table, column) or [np.zeros(0)]) for column in SPREADS[name])
        if second and len(second[0]) != len(first):
            raise InputError(f"step {step}: {' and '.join(SPREADS[name])} do not have the same tokens")
        values = first - second[0] if second else first
    values = np.asarray(values, np.float64)
    return values[np.isfinite(values)]


def count_bins(
    values: np.ndarray, num_bins: int = 40, low: float | None = None, high: float | None = None
) -> tuple[list[float], list[int]]:
    """Return the edges and counts of a histogram; the bins at its ends hold what lies further out.

    Args:
        values: finite.
        num_bins: of equal width.
        low: where the first bin begins; None: 0.5 % of the values lie below.
        high: where the last bin ends; None: 0.5 % of the values lie above.
    """
    if not values.size:
        return [], []
    least, most = np.quantile(values, [0.005, 0.995])
    low, high = least if low is None else low, most if high is None else high
    if not low < high:
        low, high = low - 0.5, low + 0.5
    counts, edges = np.histogram(np.clip(values, low, high), num_bins, (low, high))
    return [float(edge) for edge in edges], counts.tolist()


def count_workers(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Return what each rollout worker sampled in a step, by name: `responses`, `tokens`, `policy_version`, `score`.

    Raises:
        OSError, pa.ArrowException: the file cannot be read, or is of another version.
    """
    table = folder.read_step(step, ["worker", "policy_version", "score", "response_ids"])
    table = table.append_column("tokens", pa.array(lengths(table, "response_ids"))).drop_columns(["response_ids"])
    by_worker = table.group_by("worker").aggregate(
        [("tokens", "count"), ("tokens", "sum"), ("policy_version", "max"), ("score", "mean")]
    )
    rows = [
        {
            "name": row["worker"],
            "responses": row["tokens_count"],
            "tokens": row["tokens_sum"],
            "policy_version": row["policy_version_max"],
            "score": row["score_mean"] and _finite([row["score_mean"]])[0],
        }
        for row in by_worker.to_pylist()
    ]
    return sorted(rows, key=lambda row: row["name"])
