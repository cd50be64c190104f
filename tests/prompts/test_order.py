"""Mixtures: every source has its share after any number of prompts, and position is all there is to know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.order import Order, count_held_out, make_schedule
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.prompts.texts import read_usable_texts


def test_a_schedule_by_hand() -> None:
    assert make_schedule([1]).tolist() == [0]
    assert make_schedule([1, 1]).tolist() == [0, 1]
    assert make_schedule([3, 1]).tolist() == [0, 0, 0, 1]
    assert make_schedule([2, 3]).tolist() == [1, 0, 1, 0, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_after_any_number_of_prompts_each_source_has_its_share_to_less_than_one(quotas: list[int]) -> None:
    schedule, total = make_schedule(quotas), sum(quotas)
    counts = np.stack([np.cumsum(schedule == source) for source in range(len(quotas))])
    wanted = np.outer(quotas, np.arange(1, total + 1))
    assert (abs(counts * total - wanted) < total).all()
    assert counts[:, -1].tolist() == quotas


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 100), st.booleans())
def test_each_source_has_epochs_of_its_own(quotas: list[int], seed: int, start: int, shuffle: bool) -> None:
    sizes = [20 + 7 * source for source in range(len(quotas))]
    sources = np.repeat(np.arange(len(quotas)), sizes)
    order = Order(sources, quotas, seed=seed, num_held_out=11, shuffle=shuffle)
    taken = [order.index(position) for position in range(300)]
    again = Order(sources, quotas, seed=seed, num_held_out=11, shuffle=shuffle)
    assert [again.index(position) for position in range(start, 300)] == taken[start:]
    assert not set(taken) & set(order.held_out.tolist()) and len(set(order.held_out.tolist())) == 11
    held = count_held_out(quotas, 11)
    assert np.bincount(sources[order.held_out], minlength=len(quotas)).tolist() == held
    for source, size in enumerate(sizes):
        own = [index for index in taken if sources[index] == source]
        epoch = size - held[source]
        for begin in range(0, len(own) - epoch + 1, epoch):
            assert len(set(own[begin : begin + epoch])) == epoch


class Letters:
    """A tokenizer whose ids are the letters."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(
        pa.table({"text": [f"a{n}" for n in range(9)] + ["both"], "n": list(range(10))}), tmp_path / "a.parquet"
    )
    rows = [{"question": f"b{n}", "n": n / 2} for n in range(6)] + [{"question": "both", "n": 9}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def mix(folder: Path, *weights: float, **options: Any) -> PromptsConfig:
    a, b = weights
    return PromptsConfig(
        sources=[
            {"name": "first", "path": str(folder / "a.parquet"), "weight": a},
            {"name": "second", "path": str(folder / "b.jsonl"), "weight": b, "column": "question"},
        ],
        **options,
    )


def words(batch: Any) -> list[str]:
    return ["".join(map(chr, ids)) for ids in batch.prompt_ids]


def test_prompts_of_a_mixture_say_their_source(folder: Path) -> None:
    config = mix(folder, 2, 1, keep=["source", "n"])
    stream = PromptStream(config, Letters(), seed=1, num_held_out=3)
    batch = stream.take(60)
    assert batch.columns is not None
    rows = batch.columns.column("row").to_pylist()
    for word, row in zip(words(batch), rows, strict=True):
        assert (
            row == {"source": "first", "n": 9} if word == "both" else row["source"][0] == {"a": "f", "b": "s"}[word[0]]
        )
        assert word == "both" or float(row["n"]) == int(word[1:]) / (1 if word[0] == "a" else 2)
    assert [sum(row["source"] == "first" for row in rows[:n]) for n in (3, 30, 60)] == [2, 20, 40]
    assert stream.describe() == "16 texts of first (10), second (6); left out: 1 repeated"
    resumed = PromptStream(config, Letters(), seed=1, num_held_out=3)
    resumed.position = 37
    assert words(resumed.take(23)) == words(batch)[37:]
    fingerprints = {
        PromptStream(mix(folder, *weights), Letters(), 0).fingerprint for weights in ((2, 1), (1, 1), (4, 2))
    }
    assert len(fingerprints) == 2


def test_a_mixture_of_one_is_the_data_set(folder: Path) -> None:
    whole = PromptStream(PromptsConfig(path=str(folder / "a.parquet")), Letters(), seed=5, num_held_out=4)
    one = [{"name": "only", "path": str(folder / "a.parquet")}]
    mixed = PromptStream(PromptsConfig(sources=one), Letters(), seed=5, num_held_out=4)
    assert whole.take(50) == mixed.take(50) and whole.held_out() == mixed.held_out()


def test_what_is_wrong_names_the_source(folder: Path) -> None:
    def refusal(config: PromptsConfig, num_held_out: int = 0) -> str:
        with pytest.raises(InputError) as caught:
            read_usable_texts(config, num_held_out)
        return str(caught.value)

    config = mix(folder, 1, 1)
    assert "prompts.sources[1]: second has 6 usable texts, and 6 of them are held out" in refusal(config, 12)
    assert read_usable_texts(config, 11)
    (folder / "b.jsonl").write_text('{"question": "b"}\n{"question": 3}\n')
    assert refusal(config).startswith("prompts.sources[1].column=question: line 2 of")
    (folder / "b.jsonl").write_text('{"question": [{"role": "user", "content": "b"}]}\n')
    assert "some hold messages and some plain texts" in refusal(config)
    (folder / "b.jsonl").unlink()
    assert refusal(config).startswith("prompts.sources[1].path=") and "no such file" in refusal(config)
    (folder / "b.jsonl").write_text('{"question": "b", "n": "one"}\n')
    assert "prompts.keep=[n]: the sources of first, second hold other types" in refusal(mix(folder, 1, 1, keep=["n"]))
    with pytest.raises(InputError, match=r"evaluation.sets.hard.path=.*no: no such file or folder"):
        read_usable_texts(PromptsConfig(path=str(folder / "no")), 0, key="evaluation.sets.hard")
    with pytest.raises(InputError, match="prompts.subset=fr: .* is a file, which has no subsets"):
        read_usable_texts(PromptsConfig(path=str(folder / "a.parquet"), subset="fr"), 0)


def test_a_folders_subsets(tmp_path: Path) -> None:
    for name in ("en", "fr"):
        (tmp_path / f"{name}.csv").write_text(f"text\nin {name}\n")
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("en", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    assert list(read_usable_texts(PromptsConfig(path=str(tmp_path), subset="fr"), 0)) == ["in fr"]
    with pytest.raises(InputError, match="'en', 'fr'"):
        read_usable_texts(PromptsConfig(path=str(tmp_path)), 0)
