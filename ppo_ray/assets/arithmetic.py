"""The task of configs/arithmetic.yaml: sums as chat messages, and the functions that score answers to them."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_NEAR = 6  # an answer that is so far off, or further, is worth nothing
_ALONE = re.compile(r"\s*(\d+)\.?\s*")
_NUMBER = re.compile(r"\d+")


def build_sums(path: Path, digits: int = 1) -> None:
    """Write sums of two numbers to a Parquet file: the column `messages`, and the `answer`, int64.

    Args:
        path: the file.
        digits: of each number. 1: all sums of 0 to 9. 2: all of 10 to 99.
    """
    first = 10 ** (digits - 1) if digits > 1 else 0
    pairs = [(a, b) for a in range(first, 10**digits) for b in range(first, 10**digits)]
    chats = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in pairs]
    pq.write_table(pa.table({"messages": chats, "answer": [a + b for a, b in pairs]}), path)


def score_exactness(responses: Sequence[str], answer: Sequence[int]) -> list[float]:
    """Return 1 for a response that is the right number and nothing else, but for a full stop; else 0."""
    return [float(_read_alone(text) == right) for text, right in zip(responses, answer, strict=True)]


def score_form(responses: Sequence[str]) -> list[float]:
    """Return 1 for a response that is a number and nothing else, but for a full stop; else 0."""
    return [float(_read_alone(text) is not None) for text in responses]


def score_nearness(responses: Sequence[str], answer: Sequence[int]) -> list[float]:
    """Return 1 where the last number of a response is the right one, less by 1/6 per unit that it is off, else 0."""
    numbers = [[int(word) for word in _NUMBER.findall(text)] for text in responses]
    return [
        max(0.0, 1 - abs(found[-1] - right) / _NEAR) if found else 0.0
        for found, right in zip(numbers, answer, strict=True)
    ]


def _read_alone(text: str) -> int | None:
    match = _ALONE.fullmatch(text)
    return int(match[1]) if match else None
