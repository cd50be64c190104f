"""Hostile or damaged data files: the texts, or one clear error that names the option, in bounded time."""

import io
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.texts import read_usable_texts
from tests.fuzz.mutations import damaged

TEXTS = ["a film of quiet people", "日本の映画", "ends \ud83d".encode("utf-8", "replace").decode(), "", "x" * 300]


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3, 4, 5]}), buffer)
    return buffer.getvalue()


JSONL = "".join(f'{{"text": "{text}", "n": {number}}}\n' for number, text in enumerate(TEXTS)).encode()
CSV = ("text,n\n" + "".join(f'"{text}",{number}\n' for number, text in enumerate(TEXTS))).encode()


def read(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.write_bytes(content)
    config = PromptsConfig(path=str(path), min_chars=0)
    try:
        usable = read_usable_texts(config, 0)
    except InputError as error:
        assert "prompts." in str(error) and len(str(error)) < 3_000
    else:
        assert list(usable) and all(isinstance(text, str) and text.strip() for text in list(usable))
        assert len(set(list(usable))) == len(usable)
        "".join(list(usable)).encode()  # all valid Unicode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@given(content=damaged(JSONL))
def test_lines_of_json(folder: Path, content: bytes) -> None:
    read(folder, "p.jsonl", content)


@given(content=damaged(CSV))
def test_csv(folder: Path, content: bytes) -> None:
    read(folder, "p.csv", content)


@given(content=damaged(parquet()))
def test_parquet(folder: Path, content: bytes) -> None:
    read(folder, "p.parquet", content)


@given(content=st.binary(max_size=400), name=st.sampled_from(["p.jsonl", "p.csv", "p.parquet"]))
def test_any_bytes(folder: Path, content: bytes, name: str) -> None:
    read(folder, name, content)
