import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.texts import LeftOut, read_usable_texts


def config(path, **options):
    return PromptsConfig(path=str(path), **{"min_chars": 3, **options})


def test_other_columns_of_a_csv_may_hold_anything(tmp_path):
    rows = "".join(f"{number},0\n" for number in range(200_000))  # more than the block whose types are guessed
    (tmp_path / "t.csv").write_bytes(b"text,label\n" + rows.encode() + b"999 9,none\n999 8,\xff\n")
    usable = read_usable_texts(config(tmp_path / "t.csv", min_chars=4), 0)
    assert len(usable.texts) == 190_002 and usable.texts[-2:] == ["999 9", "999 8"]
    with pytest.raises(InputError, match="prompts.column=review: .* it has text, label"):
        read_usable_texts(config(tmp_path / "t.csv", column="review"), 0)


def test_a_data_set_without_a_usable_text_says_why(tmp_path):
    def message(*texts):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        with pytest.raises(InputError) as caught:
            read_usable_texts(config(tmp_path / "t.jsonl"), 0)
        return str(caught.value)

    where = f"prompts.path={tmp_path / 't.jsonl'}: no prompt left: of"
    assert message(" ", "\ud800") == (
        f"{where} 2 texts in {tmp_path / 't.jsonl'}, left out: 1 blank, 1 not valid Unicode; give texts"
    )
    assert message("1", "\ud800").endswith("left out: 1 of at most 3 characters, 1 not valid Unicode; lower it")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"of 0 texts in .*t\.parquet; give texts"):
        read_usable_texts(config(tmp_path / "t.parquet"), 0)


def bad_bytes(folder, kind):
    """Write five texts, the second and the fourth with a byte that is no UTF-8."""
    texts = [b"1 1 1 1", b"2 \xff 2 2", b"3 3 3 3", b"\xc3\x28 4 4 4", b"5 5 5 5"]
    path = folder / f"bad.{kind}"
    if kind == "csv":
        path.write_bytes(b"label,text\n" + b"".join(b"0," + one + b"\n" for one in texts))
    elif kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + b"".join(b'{"text": "' + one + b'"}\n' for one in texts))
    else:
        large = kind == "large.parquet"
        raw = pa.array(texts, pa.large_binary() if large else pa.binary())
        column = pa.Array.from_buffers(pa.large_string() if large else pa.string(), len(texts), raw.buffers())
        pq.write_table(pa.table({"text": column}), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "large.parquet"])
def test_bytes_that_are_no_utf8_cost_only_their_own_text(kind, tmp_path):
    usable = read_usable_texts(config(bad_bytes(tmp_path, kind)), 0)
    assert usable.texts == ["1 1 1 1", "3 3 3 3", "5 5 5 5"]
    assert usable.describe().endswith("left out: 2 not valid Unicode")


def test_a_line_that_is_neither_json_nor_unicode_costs_only_itself(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "1 1 1"}\n{"text": \xff\n{"text": "2 2 2"}\n')
    usable = read_usable_texts(config(tmp_path / "t.jsonl"), 0)
    assert usable.texts == ["1 1 1", "2 2 2"] and usable.left_out.invalid == 1
    (tmp_path / "t.jsonl").write_text('{"text": "1 1 1"}\n' + "[" * 100_000)
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_usable_texts(config(tmp_path / "t.jsonl"), 0)


ROWS = [{"text": "1 1 1"}, {"text": 'zwei, "2"'}, {"text": None}, {"text": "3\u2028日本"}]
TEXTS = ["1 1 1", 'zwei, "2"', "3\u2028日本"]


def compress(path, content):
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[path.suffix]) as sink:
        sink.write(content)


def content_of(kind):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    return {
        "jsonl": lines,
        "ndjson": lines,
        "json": json.dumps(ROWS, indent=1),
        "lines.json": "\n" + lines,
        "csv": 'n,text\n1,1 1 1\n2,"zwei, ""2"""\n3,\n4,3\u2028日本\n',
        "tsv": 'n\ttext\n1\t1 1 1\n2\t"zwei, ""2"""\n3\t\n4\t3\u2028日本\n',
        "txt": '1 1 1\nzwei, "2"\n\n3\u2028日本',
    }[kind].encode()


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "lines.json", "csv", "tsv", "txt"])
def test_files_of_text_are_read_compressed_or_not(kind, tmp_path):
    path = tmp_path / f"Prompts.{kind}"
    path.write_bytes(content_of(kind))
    usable = read_usable_texts(config(path), 0)
    assert usable.texts == TEXTS and usable.left_out.blank == 1
    for suffix in (".zst", ".bz2", ".gz"):
        packed = tmp_path / f"Prompts.{kind}{suffix}"
        compress(packed, path.read_bytes())
        assert read_usable_texts(config(packed), 0).texts == TEXTS
    with pytest.raises(InputError, match=r"prompts.column=review: .* has no such column; it has (n, )?text"):
        read_usable_texts(config(path, column="review"), 0)
    (tmp_path / f"torn.{kind}.gz").write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"torn.{kind}.gz: cannot be read"):
        read_usable_texts(config(tmp_path / f"torn.{kind}.gz"), 0)


def test_a_file_that_is_there_is_never_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p.xlsx", "p.jsonl.xz", "p.parquet.gz", "p"):
        (tmp_path / name).write_text("1")
        for path in (tmp_path / name, name):
            with pytest.raises(InputError, match=f"prompts.path=.*{name}: the file's name does not tell what it holds"):
                read_usable_texts(config(path), 0)
    with pytest.raises(InputError, match=r"no.jsonl.gz: no such file$"):
        read_usable_texts(config("no.jsonl.gz"), 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n "data": [{"text": "1 1 1"}]\n}', "line 1 is not JSON: .*; give an object per line, or one list of obj"),
        ('{"data": [{"text": "1 1 1"}]}', "no such column; it has data"),
        ('["1 1 1"]', "item 1 is not a JSON object"),
        ('"1 1 1"', "line 1 is not a JSON object"),
        ('[{"text": "1 1 1"}', "the file is not JSON"),
        ('[{"text": "1 1 1"}, {"text": 3}]', r"item 2 of .* holds 3, neither text nor messages"),
    ],
)
def test_json_of_another_shape_is_refused(content, words, tmp_path):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_usable_texts(config(tmp_path / "p.json"), 0)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
def test_columns_of_any_kind_of_text(kind, tmp_path):
    texts = ["1 1 1", "2 2 2", "1 1 1", None, "3 3 3"]
    structs = [None if text is None else {"text": text, "n": {"text": text[::-1]}} for text in texts]
    table = pa.table(
        {
            "plain": texts,
            "large": pa.array(texts, pa.large_string()),
            "view": pa.array(texts, pa.string_view()),
            "category": pa.array(texts).dictionary_encode(),
            "meta": structs,
            "a.b": texts,
            "number": [1] * 5,
            "category of numbers": pa.array([1] * 5).dictionary_encode(),
        }
    )
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if "stream" in kind else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    for column in ("plain", "large", "view", "category", "meta.text", "meta.n.text", "a.b"):
        usable = read_usable_texts(config(path, column=column), 0)
        assert (usable.texts, usable.left_out) == (["1 1 1", "2 2 2", "3 3 3"], LeftOut(blank=1, repeated=1))
    for column in ("number", "category of numbers", "meta", "meta.n"):
        refusal = f"prompts.column={column}: the column in .* holds .*, neither text nor messages"
        with pytest.raises(InputError, match=refusal):
            read_usable_texts(config(path, column=column), 0)
    for column in ("meta.other", "plain.text", "meta.text.x", "other.text"):
        with pytest.raises(InputError, match=f"prompts.column={column}: .* has no such column; it has plain, large"):
            read_usable_texts(config(path, column=column), 0)


def test_bytes_that_are_no_utf8_in_a_category(tmp_path):
    raw = pa.array([b"1 1 1", b"2 \xff 2"], pa.binary())
    words = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), words)
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), pa.schema([("text", column.type)])) as writer:
        writer.write_table(pa.table({"text": column}))
    usable = read_usable_texts(config(tmp_path / "t.arrow"), 0)
    assert usable.texts == ["1 1 1"] and usable.left_out == LeftOut(invalid=1, repeated=1)


def test_objects_in_json_are_named_by_their_path(tmp_path):
    rows = [{"meta": {"text": "1 1 1"}}, {"meta": None}, {"meta": {}}, {}, {"meta": {"text": "2 2 2"}}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usable = read_usable_texts(config(tmp_path / "t.jsonl", column="meta.text"), 0)
    assert usable.texts == ["1 1 1", "2 2 2"] and usable.left_out.blank == 3
    with pytest.raises(InputError, match=r"prompts.column=meta.review: .* it has meta$"):
        read_usable_texts(config(tmp_path / "t.jsonl", column="meta.review"), 0)


def test_what_save_to_disk_wrote(tmp_path):
    rows = {"text": ["1 1 1", "2 2 2"], "meta": [{"text": "3 3 3"}, {"text": "4 4 4"}]}
    one = datasets.Dataset.from_dict(rows)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "two")
    for path in ("one", "two"):
        assert read_usable_texts(config(tmp_path / path), 0).texts == ["1 1 1", "2 2 2"]
        assert read_usable_texts(config(tmp_path / path, column="meta.text"), 0).texts == ["3 3 3", "4 4 4"]
    assert read_usable_texts(config(tmp_path / "two", split="test"), 0).texts == ["2 2 2"]
    with pytest.raises(InputError, match="prompts.split=valid: .* has no such split; it has train, test"):
        read_usable_texts(config(tmp_path / "two", split="valid"), 0)
    (tmp_path / "one" / "data-00000-of-00002.arrow").write_bytes(b"torn")
    with pytest.raises(InputError, match="one: cannot be read: "):
        read_usable_texts(config(tmp_path / "one"), 0)


def test_another_column_that_differs_from_file_to_file_does_not_matter(tmp_path):
    def fill(number, *rows):
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    fill(0, {"text": "1 1 1", "meta": None})
    fill(1, {"text": "2 2 2", "meta": {"n": 1}})
    with pytest.raises(Exception, match="error occurred while generating"):  # what the library makes of it
        datasets.load_dataset(str(tmp_path), split="train")
    assert read_usable_texts(config(tmp_path), 0).texts == ["1 1 1", "2 2 2"]
    fill(1, {"text": 2, "meta": {"n": 1}})
    with pytest.raises(
        InputError, match=r"prompts.column=text: line 1 of .*train-1.jsonl holds 2, neither text nor messages"
    ):
        read_usable_texts(config(tmp_path), 0)


def test_a_folder_without_data_is_said_to_be_one(tmp_path):
    with pytest.raises(InputError, match="the folder cannot be read as a data set: .* doesn't contain any data files"):
        read_usable_texts(config(tmp_path), 0)
