import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts import PromptBatch, PromptStream

NUM_TEXTS = 20


@pytest.fixture(scope="module")
def tokenizer():
    # text number n is "n n n ...", and its token id is n; an x is no token
    words = {str(number): number for number in range(1000)}
    backend = Tokenizer(models.WordLevel(words, unk_token=None))
    backend.normalizer = normalizers.Replace("x", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def text(number, num_words=12):
    return " ".join([str(number)] * num_words)


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": [text(100 + n) for n in range(NUM_TEXTS)], "label": [0] * NUM_TEXTS}), path)
    return path


def config(path, **options):
    return PromptsConfig(path=str(path), **{"min_chars": 3, **options})


def numbers(batch):
    return [ids[0] for ids in batch.prompt_ids]


def test_lengths_are_uniform_inclusive_at_both_ends(parquet, tokenizer):
    stream = PromptStream(config(parquet, min_tokens=2, max_tokens=5), tokenizer, seed=3)
    counts = Counter(len(ids) for ids in stream.take(2000).prompt_ids)
    assert set(counts) == {2, 3, 4, 5}
    assert all(400 < count < 600 for count in counts.values())  # 500 expected, standard deviation 19


def test_each_epoch_is_its_own_permutation(parquet, tokenizer):
    stream = PromptStream(config(parquet), tokenizer, seed=1)
    first, second = numbers(stream.take(NUM_TEXTS)), numbers(stream.take(NUM_TEXTS))
    assert sorted(first) == sorted(second) == list(range(100, 120))
    assert first != second != list(range(100, 120))


def test_position_is_the_whole_state(parquet, tokenizer):
    stream = PromptStream(config(parquet), tokenizer, seed=5, num_held_out=3)
    whole = stream.take(50)
    assert whole.sample_ids == tuple(range(50)) and stream.position == 50
    resumed = PromptStream(config(parquet), tokenizer, seed=5, num_held_out=3)
    resumed.position = 13  # crosses two ends of epochs of 17 texts
    rest = resumed.take(37)
    assert rest == PromptBatch(whole.sample_ids[13:], whole.prompt_ids[13:])
    resumed.position = 0
    parts = [resumed.take(n) for n in (1, 30, 19)]
    assert sum((part.prompt_ids for part in parts), ()) == whole.prompt_ids


def test_seed_changes_order_and_lengths(parquet, tokenizer):
    batches = [PromptStream(config(parquet), tokenizer, seed=seed).take(NUM_TEXTS) for seed in (0, 1)]
    assert numbers(batches[0]) != numbers(batches[1])
    assert [len(ids) for ids in batches[0].prompt_ids] != [len(ids) for ids in batches[1].prompt_ids]


def test_no_shuffle_is_the_order_of_the_data(parquet, tokenizer):
    stream = PromptStream(config(parquet, shuffle=False), tokenizer, seed=0)
    assert numbers(stream.take(NUM_TEXTS + 2)) == [*range(100, 120), 100, 101]


def test_held_out_is_the_same_for_every_seed_and_never_taken(parquet, tokenizer):
    streams = [PromptStream(config(parquet), tokenizer, seed=seed, num_held_out=6) for seed in (0, 1, 2)]
    held_out = streams[0].held_out()
    assert all(stream.held_out() == held_out for stream in streams)
    assert len(set(numbers(held_out))) == 6 and all(sample_id < 0 for sample_id in held_out.sample_ids)
    for stream in streams:
        taken = set(numbers(stream.take(14)))
        assert len(taken) == 14 and not taken & set(numbers(held_out))
    assert PromptStream(config(parquet), tokenizer, seed=0).held_out() == PromptBatch((), ())


def test_texts_must_be_longer_than_min_chars_and_blank_or_null_ones_are_skipped(tmp_path, tokenizer):
    texts = ["7 7", "8 8 8", " " * 50, None, "9 9 9 9", "9 9 9 9", ""]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    options = {"shuffle": False, "min_tokens": 2, "max_tokens": 2}
    for min_chars, expected in ((3, [8, 9, 8]), (5, [9, 9, 9]), (2, [7, 8, 9])):
        stream = PromptStream(config(tmp_path / "t.parquet", min_chars=min_chars, **options), tokenizer, seed=0)
        assert numbers(stream.take(3)) == expected


def test_a_text_shorter_than_its_length_is_used_whole(tmp_path, tokenizer):
    pq.write_table(pa.table({"text": ["5 5 5"]}), tmp_path / "t.parquet")
    stream = PromptStream(config(tmp_path / "t.parquet", min_tokens=8, max_tokens=8), tokenizer, seed=0)
    assert stream.take(1).prompt_ids == ((5, 5, 5),)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder"])
def test_other_sources_give_the_same_texts(kind, parquet, tmp_path, tokenizer, monkeypatch):
    texts = [text(100 + n) for n in range(NUM_TEXTS)]
    if kind == "csv":
        path = tmp_path / "texts.csv"
        path.write_text("label,text\n" + "".join(f'0,"{line}"\n' for line in texts))
    else:
        path = tmp_path / ("texts.jsonl" if kind == "jsonl" else "folder/train.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    path = path.parent if kind == "folder" else path
    expected = PromptStream(config(parquet), tokenizer, seed=4).take(25)
    assert PromptStream(config(path), tokenizer, seed=4).take(25) == expected


def test_csv_texts_may_hold_newlines_and_one_without_a_token_is_an_error(tmp_path, tokenizer):
    (tmp_path / "t.csv").write_text('text\n"12\n12 12"\nxxxx\n')
    stream = PromptStream(config(tmp_path / "t.csv", shuffle=False), tokenizer, seed=0)
    with pytest.raises(InputError, match="no token of 'xxxx'"):
        stream.take(2)
    assert stream.position == 0 and numbers(stream.take(1)) == [12]


def test_errors_name_the_option(parquet, tmp_path, tokenizer):
    def message(**options):
        with pytest.raises(InputError) as caught:
            PromptStream(config(**{"path": parquet, **options}), tokenizer, seed=0, num_held_out=num_held_out)
        return str(caught.value)

    num_held_out = 0
    assert "no such file" in message(path=tmp_path / "no.parquet")
    assert "no such folder" in message(path=tmp_path / "no")
    assert message(column="review").startswith("prompts.column=review") and "text, label" in message(column="review")
    assert "int64, not text" in message(column="label")
    assert "prompts.min_chars=500: no prompt left: of 20 texts" in message(min_chars=500)
    (tmp_path / "broken.parquet").write_text("no parquet")
    assert "cannot be read" in message(path=tmp_path / "broken.parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 is not JSON" in message(path=tmp_path / "broken.jsonl")
    num_held_out = NUM_TEXTS
    assert message().startswith("evaluation.num_prompts=20") and "19 or less" in message()


def test_a_hub_that_cannot_be_reached_is_said(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"(?s)prompts.path=nobody/nothing.*from the hub.*asset:prompts"):
        PromptStream(config("nobody/nothing"), tokenizer, seed=0)


def test_split_keeps_order_and_loses_nothing():
    batch = PromptBatch(tuple(range(7)), tuple((n,) for n in range(7)))
    parts = batch.split(3)
    assert [len(part.sample_ids) for part in parts] == [2, 2, 3]
    assert sum((part.prompt_ids for part in parts), ()) == batch.prompt_ids
    assert len(batch.split(100)) == 7
