import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.prompts.texts import LeftOut, read_usable_texts

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
    return PromptsConfig(path=str(path), **{"min_chars": 3, "min_tokens": 2, "max_tokens": 8, **options})


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


def adding(template, **options):
    """Make a tokenizer that puts special tokens around a text as the template says; a text's words are its letters."""
    names = ["<s>", "</s>", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate([*names, *"abc"])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        template, special_tokens=list(zip(names, range(4), strict=True))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", cls_token="[CLS]", sep_token="[SEP]", **options
    )


@pytest.mark.parametrize(
    ("template", "front"),
    [
        ("$A </s>", []),
        ("<s> $A </s>", [0]),
        ("[CLS] $A [SEP]", [2]),
        ("<s> $A", [0]),
        ("$A", []),
        ("$A [SEP] </s>", []),
    ],
)
def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_prompt(tmp_path, template, front):
    path = tmp_path / "texts.jsonl"

    def prompt(text, num_tokens=9):
        path.write_text(json.dumps({"text": text}))
        options = {"min_chars": 0, "min_tokens": num_tokens, "max_tokens": num_tokens}
        return list(PromptStream(config(path, **options), adding(template), seed=0).take(1).prompt_ids[0])

    assert prompt("a b c") == [*front, 4, 5, 6]
    assert prompt("a b c", 2) == [*front, 4, 5, 6][:2]
    assert prompt("a b </s>") == [*front, 4, 5, 1]  # the text's own
    assert prompt("a </s> b") == [*front, 4, 1, 5]
    assert prompt("<s> a") == ([0, 4] if front == [0] else [*front, 0, 4])  # once


@pytest.mark.parametrize(("template", "times"), [("$A", 1), ("<s> $A", 2), ("$A </s>", 2)])
def test_texts_are_tokenised_once_if_nothing_is_added_to_them(tmp_path, monkeypatch, template, times):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a b c"}))
    stream = PromptStream(config(tmp_path / "texts.jsonl", min_chars=0), adding(template), seed=0)
    calls = []
    own = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda *args, **named: calls.append(1) or own(*args, **named)
    )
    assert len(stream.take(1).prompt_ids) == 1 and len(calls) == times


def test_a_slow_tokenizer_that_appends_its_end(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "ab"}))
    stream = PromptStream(config(path, min_chars=0, min_tokens=9, max_tokens=9), ByT5Tokenizer(), seed=0)
    assert stream.take(1).prompt_ids == ((100, 101),)  # bytes, and three special tokens before them


def test_the_prompts_of_a_tokenizer_that_adds_nothing_are_as_ever(tiny_policy, tiny_prompts):
    """A run that began with an earlier version is known by this fingerprint."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    state = xxhash.xxh3_64()
    texts = pq.read_table(tiny_prompts).column("text").to_pylist()
    for one in texts:
        state.update(f"{len(one.encode())}:".encode() + one.encode())
    state.update(json.dumps(tokenizer(texts[:16])["input_ids"]).encode())
    assert PromptStream(config(tiny_prompts), tokenizer, seed=0).fingerprint == state.hexdigest()


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


def test_csv_texts_may_hold_newlines(tmp_path, tokenizer):
    (tmp_path / "t.csv").write_text('text\n"12\n12 12"\n13 13\n')
    stream = PromptStream(config(tmp_path / "t.csv", shuffle=False), tokenizer, seed=0)
    assert numbers(stream.take(2)) == [12, 13]


def test_errors_name_the_option(parquet, tmp_path, tokenizer):
    def message(**options):
        with pytest.raises(InputError) as caught:
            PromptStream(config(**{"path": parquet, **options}), tokenizer, seed=0, num_held_out=num_held_out)
        return str(caught.value)

    num_held_out = 0
    assert "no such file" in message(path=tmp_path / "no.parquet")
    assert "no such file or folder" in message(path=tmp_path / "no")
    assert message(column="review").startswith("prompts.column=review") and "text, label" in message(column="review")
    assert "int64, neither text nor messages" in message(column="label")
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


def test_prompts_that_cannot_be_used_are_left_out_and_counted(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    texts = [text(1), "x x x x x", text(3), text(700), text(5)]  # number 1 is a text without a token, 3 an unknown id
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    stream = PromptStream(config(path, shuffle=False), tokenizer, seed=0, vocab_size=500)
    batch = stream.take(5)
    assert (batch.sample_ids, numbers(batch), batch.num_skipped) == ((0, 2, 4), [1, 3, 5], 2)
    assert stream.position == 5
    assert sum(part.num_skipped for part in batch.split(2)) == 0 and batch.split(2)[1].sample_ids == (2, 4)
    assert PromptStream(config(path, shuffle=False), tokenizer, seed=0).take(5).num_skipped == 1


def test_a_text_that_the_tokenizer_refuses_is_left_out_alone(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in (text(1), "no number", text(3))))
    with pytest.raises(Exception, match="UNK"):  # as it is: a batch that holds such a text raises
        tokenizer([text(1), "no number"])
    batch = PromptStream(config(path, shuffle=False), tokenizer, seed=0).take(3)
    assert (batch.sample_ids, numbers(batch), batch.num_skipped) == ((0, 2), [1, 3], 1)


def test_held_out_prompts_that_cannot_be_used_are_left_out(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in (1, 2, 3, 4, 700, 701)))
    whole = PromptStream(config(path), tokenizer, seed=0, num_held_out=5).held_out()
    batch = PromptStream(config(path), tokenizer, seed=0, num_held_out=5, vocab_size=700).held_out()
    rest = [(sample_id, ids) for sample_id, ids in zip(whole.sample_ids, whole.prompt_ids, strict=True) if ids[0] < 700]
    assert list(zip(batch.sample_ids, batch.prompt_ids, strict=True)) == rest
    assert len(rest) == 5 - batch.num_skipped and batch.num_skipped in (1, 2)


def test_a_model_that_knows_none_of_the_ids_is_said(tmp_path, parquet, tokenizer):
    why = "the model knows 0 to 99; tokenizer and model do not fit together"
    stream = PromptStream(config(parquet, shuffle=False), tokenizer, seed=0, num_held_out=3, vocab_size=100)
    with pytest.raises(InputError, match=rf"none of 5 texts makes a prompt: of '1\d\d 1.* ids \[1\d\d, .*{why}"):
        stream.take(5)
    with pytest.raises(InputError, match=f"none of 3 texts makes a prompt.*{why}"):
        stream.held_out()
    (tmp_path / "x.csv").write_text("text\nxxxx\n")
    with pytest.raises(InputError, match=r"makes a prompt: of 'xxxx' the tokenizer makes the ids \[\];"):
        PromptStream(config(tmp_path / "x.csv"), tokenizer, seed=0).take(1)


def test_a_look_ahead_moves_nothing(parquet, tokenizer):
    stream = PromptStream(config(parquet), tokenizer, seed=0)
    assert stream.peek(3) == stream.take(3)
    assert stream.position == 3


def test_the_fingerprint_tells_texts_and_tokenizers_apart(tmp_path, tokenizer):
    def fingerprint(texts, by=tokenizer, seed=0):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        return PromptStream(config(path), by, seed=seed).fingerprint

    texts = [text(1), text(2), text(3)]
    other = Tokenizer(models.WordLevel({str(number): number + 1 for number in range(1000)}, unk_token=None))
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = [
        fingerprint(texts),
        fingerprint([text(1), text(2), text(4)]),
        fingerprint(texts[::-1]),
        fingerprint([text(1) + text(2), text(3)]),
        fingerprint(texts, PreTrainedTokenizerFast(tokenizer_object=other)),
    ]
    assert len(set(found)) == 5
    assert fingerprint(texts, seed=7) == found[0]


def test_the_fingerprint_is_the_same_whatever_the_position_and_however_long_the_texts(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text(n, 100_000)}) + "\n" for n in range(3)))
    stream = PromptStream(config(path), tokenizer, seed=0)
    before = stream.fingerprint
    stream.take(2)
    assert stream.fingerprint == before == PromptStream(config(path), tokenizer, seed=9).fingerprint
    assert len(before) == 16 and int(before, 16) >= 0


def test_what_is_left_out_is_counted_by_its_reason(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    texts = [text(1), text(1), text(2), "3", "   \t  ", None, "half \ud800 of a pair", "\ud800"]
    path.write_text("\n".join(json.dumps({"text": one}) for one in texts))
    stream = PromptStream(config(path), tokenizer, seed=0)
    assert sorted(numbers(stream.take(2))) == [1, 2]
    assert stream.describe() == (
        f"2 texts of {path}; left out: 1 of at most 3 characters, 2 blank, 1 repeated, 2 not valid Unicode"
    )
    assert read_usable_texts(config(path), 0).left_out == LeftOut(blank=2, invalid=2, short=1, repeated=1)
    path.write_text(json.dumps({"text": text(1)}))
    assert PromptStream(config(path), tokenizer, seed=0).describe() == f"1 texts of {path}"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_text_far_longer_than_any_context_is_cut(kind, tmp_path, tokenizer):
    long = text(7, 500_000)  # a million characters
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [long]}), path)
    else:
        path.write_text(json.dumps({"text": long}) if kind == "jsonl" else f"text\n{long}\n")
    assert PromptStream(config(path, max_tokens=8, min_tokens=8), tokenizer, seed=0).take(1).prompt_ids == ((7,) * 8,)


def test_a_group_is_its_prompt_several_times_and_the_position_counts_prompts(parquet, tokenizer):
    options = {"path": parquet, "keep": ("label",)}
    alone, groups = (PromptStream(config(**options), tokenizer, seed=5, responses_per_prompt=times) for times in (1, 3))
    wanted, batch = alone.take(4), groups.take(12)
    assert batch.prompt_ids == tuple(ids for ids in wanted.prompt_ids for _ in range(3))
    assert batch.sample_ids == tuple(range(12)) and groups.position == 4
    assert batch.columns.column("group_id").to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.columns.column("row").to_pylist() == [{"label": 0}] * 12
    assert batch.addresses == [
        (0,),
        (0, 1),
        (0, 2),
        (1,),
        (1, 1),
        (1, 2),
        *((n, *m) for n in (2, 3) for m in ((), (1,), (2,))),
    ]
    assert groups.take(3).sample_ids == (12, 13, 14) and groups.position == 5
    assert groups.peek(2).prompt_ids == alone.take(3).prompt_ids[1:]  # each once, whatever the groups
    assert len(groups.held_out().sample_ids) == 0


def test_parts_of_groups_are_groups(parquet, tokenizer):
    batch = PromptStream(config(parquet), tokenizer, seed=5, responses_per_prompt=3).take(15)
    parts = batch.split(2)
    assert [part.columns.column("group_id").to_pylist() for part in parts] == [
        [0] * 3 + [1] * 3,
        [2] * 3 + [3] * 3 + [4] * 3,
    ]
    assert [address for part in parts for address in part.addresses] == batch.addresses
    assert len(batch.split(9)) == 5


def test_a_prompt_that_cannot_be_used_takes_its_group_with_it(tmp_path, tokenizer):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["5 5 5", "x x x", "7 7 7"]}), path)
    stream = PromptStream(config(path, shuffle=False), tokenizer, seed=0, responses_per_prompt=2)
    batch = stream.take(6)
    assert numbers(batch) == [5, 5, 7, 7] and batch.sample_ids == (0, 1, 4, 5)
    assert (batch.num_skipped, stream.position) == (1, 3)
