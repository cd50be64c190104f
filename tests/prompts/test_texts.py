import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.texts import read_usable_texts


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
