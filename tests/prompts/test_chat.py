"""Conversations as prompts: the ids are the chat template's own, and nothing is cut or guessed."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.stream import PromptStream

MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if think is defined %}{{ think }}{% endif %}"
    "{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}{{ '[' + m.role + '] ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


def make_tokenizer(template: str | None, adds: bool = True) -> Any:
    """Make a tokenizer of bytes; `adds` puts <s> in front of every text and </s> behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({**{mark: n for n, mark in enumerate(MARKS)}, **{c: n + 4 for n, c in enumerate(alphabet)}}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(MARKS)
    if adds:
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def open_stream(path: Path, tokenizer: Any, **options: Any) -> PromptStream:
    options = {"column": "messages", "shuffle": False, **options}
    return PromptStream(PromptsConfig(path=str(path), **options), tokenizer, seed=0, vocab_size=300)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
turns = st.lists(st.tuples(words, words), max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.booleans(), turns, words), min_size=1, max_size=10),
    template=st.booleans(),
    adds=st.booleans(),
)
def test_ids_are_those_of_the_template(tmp_path_factory: Any, rows: Any, template: bool, adds: bool) -> None:
    tokenizer = make_tokenizer(CHATML if template else LLAMA, adds)
    conversations = []
    for has_system, pairs, last in rows:
        messages = [{"role": "system", "content": "Be brief."}] if has_system and template else []
        for question, answer in pairs:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append([*messages, {"role": "user", "content": last}])
    path = write_lines(tmp_path_factory.mktemp("chat") / "c.jsonl", [{"messages": row} for row in conversations])
    unique = [json.loads(text) for text in dict.fromkeys(map(json.dumps, conversations))]
    batch = open_stream(path, tokenizer, max_tokens=4096).take(len(unique))
    wanted = [
        tokenizer(
            tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False), add_special_tokens=False
        )
        for row in unique
    ]
    assert batch.prompt_ids == tuple(tuple(ids["input_ids"]) for ids in wanted)
    assert all(ids.count(0) == (not template) for ids in batch.prompt_ids)  # a beginning of sequence is there once
    assert [json.loads(text) for text in batch.columns.column("messages").to_pylist()] == unique


@pytest.mark.parametrize("kind", ["lists.parquet", "lists.jsonl", "json.csv", "json.jsonl", "json.parquet"])
def test_messages_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    chats = [QUESTION, [{"role": "system", "content": "x"}, *QUESTION]]
    column = [json.dumps(chat) for chat in chats] if kind.startswith("json") else chats
    path = tmp_path / kind
    if kind.endswith("parquet"):
        pq.write_table(pa.table({"messages": column}), path)
    elif kind.endswith("csv"):
        quoted = [text.replace('"', '""') for text in column]
        path.write_text("messages\n" + "".join(f'"{text}"\n' for text in quoted))
    else:
        write_lines(path, [{"messages": row} for row in column])
    batch = open_stream(path, make_tokenizer(CHATML)).take(2)
    tokenizer = make_tokenizer(CHATML)
    assert [tokenizer.decode(ids) for ids in batch.prompt_ids] == [
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_system_message_arguments_and_a_template_of_ones_own(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"messages": QUESTION}, {"text": "Why?"}])
    tokenizer = make_tokenizer(CHATML)
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}>")

    def shown(**options: Any) -> str:
        return tokenizer.decode(open_stream(path, tokenizer, **options).take(1).prompt_ids[0])

    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat"
    assert shown(system="Be brief.").startswith(begin)
    assert shown(template_arguments={"think": "Hm."}).endswith("assistant\nHm.")
    assert shown(chat_template=str(own), system="x") == "s:xu:What is 2 + 3?>"
    plain = {"column": "text", "chat_template": "tokenizer"}
    assert shown(**plain) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(column="text", system="x").startswith("<|im_start|>system\nx")
    assert shown(column="text") == "<s>Why?"


def test_what_cannot_be_a_prompt_is_refused_with_its_row(tmp_path: Path) -> None:
    def refusal(*chats: Any, template: str | None = CHATML, **options: Any) -> str:
        path = write_lines(tmp_path / "c.jsonl", [{"messages": chat} for chat in chats])
        with pytest.raises(InputError) as caught:
            open_stream(path, make_tokenizer(template), **options)
        return str(caught.value)

    answered = [*QUESTION, {"role": "assistant", "content": "5"}]
    assert "row 2 of" in refusal(QUESTION, answered) and "ends with the assistant's message" in refusal(answered)
    assert "content is a list, not text" in refusal([{"role": "user", "content": [{"type": "image"}]}])
    assert "row 2" in refusal(QUESTION, [{"content": "x"}]) and "without a role" in refusal(
        QUESTION, [{"content": "x"}]
    )
    assert "has no chat template; give a file" in refusal(QUESTION, template=None)
    assert "no system here" in refusal([{"role": "system", "content": "x"}, *QUESTION], template=LLAMA)
    assert "needs" in refusal(QUESTION, chat_template="none") or "need one" in refusal(QUESTION, chat_template="none")
    assert "would cut off where the assistant's answer begins" in refusal(QUESTION, too_long="cut")
    assert "a conversation is a prompt as a whole" in refusal(QUESTION, min_tokens=2)
    assert "cannot be read" in refusal(QUESTION, chat_template=str(tmp_path / "no.jinja"))


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = ["a" * size for size in (3, 9, 10, 11, 40)]
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    tokenizer = make_tokenizer(None)

    def lengths(**options: Any) -> list[int]:
        stream = open_stream(path, tokenizer, column="text", max_tokens=11, **options)
        return [len(ids) for ids in stream.take(5).prompt_ids]

    stream = open_stream(path, tokenizer, column="text", max_tokens=11)
    assert stream.describe().endswith("left out: 2 of more than 11 tokens")
    assert lengths() == [4, 10, 11, 4, 10]  # <s> in front
    assert lengths(too_long="cut") == [4, 10, 11, 11, 11] == lengths(too_long="keep_end")
    ends = open_stream(path, tokenizer, column="text", max_tokens=11, too_long="keep_end").take(5).prompt_ids
    assert [ids[0] == 0 for ids in ends] == [True, True, True, False, False]
    with pytest.raises(InputError, match=r"prompts.max_tokens=3: no prompt left: .* 5 of more than 3 tokens"):
        open_stream(path, tokenizer, column="text", max_tokens=3)


def test_a_long_count_of_tokens_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "t.jsonl", [{"text": f"{number}?"} for number in range(5000)])
    config, tokenizer, shown = PromptsConfig(path=str(path), max_tokens=9), make_tokenizer(None), []
    monkeypatch.setattr("ppo_ray.prompts.stream.SHOW_S", 1e9)
    PromptStream(config, tokenizer, seed=0, show=shown.append)
    assert not shown  # it was done before a line was due
    monkeypatch.setattr("ppo_ray.prompts.stream.SHOW_S", 0)
    PromptStream(config, tokenizer, seed=0, show=shown.append)
    assert shown == [f"counting the tokens of 5,000 prompts: {share}" for share in ("20%", "41%", "61%", "82%")]


ROWS = [
    {"text": f"What is {n}?", "answer": n * n, "meta": {"source": f"s{n}", "deep": [n, n]}, "share": n / 7}
    for n in range(50)
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow"])
def test_the_row_travels_with_its_prompt(tmp_path: Path, kind: str) -> None:
    path, table = tmp_path / f"t.{kind}", pa.Table.from_pylist(ROWS)
    keep = ["answer", "share"] if kind == "csv" else ["answer", "meta.source", "meta.deep", "share", "meta"]
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        pa.csv.write_csv(table.drop_columns(["meta"]), path)
    else:
        write_lines(path, ROWS)
    stream = open_stream(path, make_tokenizer(None), column="text", keep=keep, shuffle=True)
    tokenizer, seen = make_tokenizer(None), []
    for part in [part for _ in range(3) for part in stream.take(50).split(3)]:
        for ids, row in zip(part.prompt_ids, part.columns.column("row").to_pylist(), strict=True):
            number = int(tokenizer.decode(ids, skip_special_tokens=True)[8:-1])
            seen.append(number)
            assert (row["answer"], row["share"]) == (number**2, pytest.approx(number / 7))
            if kind != "csv":
                assert (row["source"], row["deep"], row["meta"]) == (f"s{number}", [number] * 2, ROWS[number]["meta"])
    assert sorted(seen) == sorted([*range(50)] * 3)
    kinds = {field.name: field.type for field in stream.peek(1).columns.schema.field("row").type}
    assert (kinds["answer"], kinds["share"]) == (pa.int64(), pa.float64())


def test_a_text_with_another_answer_is_another_prompt(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a b", "answer": n} for n in (1, 2, 1)])
    tokenizer = make_tokenizer(None)
    assert open_stream(path, tokenizer, column="text").describe().startswith("1 texts")
    with_answers = open_stream(path, tokenizer, column="text", keep=["answer"])
    assert with_answers.describe().startswith("2 texts")
    assert with_answers.fingerprint != open_stream(path, tokenizer, column="text").fingerprint


def test_kept_columns_that_are_not_there_or_of_two_types_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a", "answer": 1}, {"text": "b", "answer": "two"}])
    with pytest.raises(InputError, match=r"prompts.keep=answer: row 2 of .*t.jsonl does not fit into the column"):
        open_stream(path, make_tokenizer(None), column="text", keep=["answer"])
    with pytest.raises(InputError, match=r"prompts.keep=anwser: .* has no such column; it has text, answer"):
        open_stream(path, make_tokenizer(None), column="text", keep=["anwser"])
