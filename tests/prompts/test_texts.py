import http.server
import itertools
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

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
    assert len(usable) == 190_002 and list(usable)[-2:] == ["999 9", "999 8"]
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
    assert list(usable) == ["1 1 1 1", "3 3 3 3", "5 5 5 5"]
    assert usable.describe().endswith("left out: 2 not valid Unicode")


def test_a_line_that_is_neither_json_nor_unicode_costs_only_itself(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "1 1 1"}\n{"text": \xff\n{"text": "2 2 2"}\n')
    usable = read_usable_texts(config(tmp_path / "t.jsonl"), 0)
    assert list(usable) == ["1 1 1", "2 2 2"] and usable.left_out.invalid == 1
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
    assert list(usable) == TEXTS and usable.left_out.blank == 1
    for suffix in (".zst", ".bz2", ".gz"):
        packed = tmp_path / f"Prompts.{kind}{suffix}"
        compress(packed, path.read_bytes())
        assert list(read_usable_texts(config(packed), 0)) == TEXTS
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
        assert (list(usable), usable.left_out) == (["1 1 1", "2 2 2", "3 3 3"], LeftOut(blank=1, repeated=1))
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
    assert list(usable) == ["1 1 1"] and usable.left_out == LeftOut(invalid=1, repeated=1)


def test_objects_in_json_are_named_by_their_path(tmp_path):
    rows = [{"meta": {"text": "1 1 1"}}, {"meta": None}, {"meta": {}}, {}, {"meta": {"text": "2 2 2"}}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usable = read_usable_texts(config(tmp_path / "t.jsonl", column="meta.text"), 0)
    assert list(usable) == ["1 1 1", "2 2 2"] and usable.left_out.blank == 3
    with pytest.raises(InputError, match=r"prompts.column=meta.review: .* it has meta$"):
        read_usable_texts(config(tmp_path / "t.jsonl", column="meta.review"), 0)


def test_what_save_to_disk_wrote(tmp_path):
    rows = {"text": ["1 1 1", "2 2 2"], "meta": [{"text": "3 3 3"}, {"text": "4 4 4"}]}
    one = datasets.Dataset.from_dict(rows)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "two")
    for path in ("one", "two"):
        assert list(read_usable_texts(config(tmp_path / path), 0)) == ["1 1 1", "2 2 2"]
        assert list(read_usable_texts(config(tmp_path / path, column="meta.text"), 0)) == ["3 3 3", "4 4 4"]
    assert list(read_usable_texts(config(tmp_path / "two", split="test"), 0)) == ["2 2 2"]
    with pytest.raises(InputError, match="prompts.split=valid: .* has no such split; it has train, test"):
        read_usable_texts(config(tmp_path / "two", split="valid"), 0)
    (tmp_path / "one" / "data-00000-of-00002.arrow").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"data-00000-of-00002\.arrow: cannot be read: "):
        read_usable_texts(config(tmp_path / "one"), 0)


def test_another_column_that_differs_from_file_to_file_does_not_matter(tmp_path):
    def fill(number, *rows):
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    fill(0, {"text": "1 1 1", "meta": None})
    fill(1, {"text": "2 2 2", "meta": {"n": 1}})
    with pytest.raises(Exception, match="error occurred while generating"):  # what the library makes of it
        datasets.load_dataset(str(tmp_path), split="train")
    assert list(read_usable_texts(config(tmp_path), 0)) == ["1 1 1", "2 2 2"]
    fill(1, {"text": 2, "meta": {"n": 1}})
    with pytest.raises(
        InputError, match=r"prompts.column=text: line 1 of .*train-1.jsonl holds 2, neither text nor messages"
    ):
        read_usable_texts(config(tmp_path), 0)


def test_a_folder_without_data_is_said_to_be_one(tmp_path):
    with pytest.raises(InputError, match="the folder cannot be read as a data set: .* doesn't contain any data files"):
        read_usable_texts(config(tmp_path), 0)


def test_a_folder_is_read_as_its_files_are(tmp_path):
    (tmp_path / "train-1.csv").write_text("text,n\nNA NA,1\n1 1 1,2\n")
    (tmp_path / "train-2.jsonl").write_text('{"text": "2 2 2"}\n')
    (tmp_path / "test.csv").write_text("text\n3 3 3\n")
    with pytest.raises(InputError, match="cannot be read as a data set"):  # two formats: the library does not say which
        read_usable_texts(config(tmp_path), 0)
    (tmp_path / "train-2.jsonl").unlink()
    assert list(read_usable_texts(config(tmp_path), 0)) == ["NA NA", "1 1 1"]
    assert list(read_usable_texts(config(tmp_path, split="test"), 0)) == ["3 3 3"]
    with pytest.raises(InputError, match="prompts.split=valid: .*valid"):
        read_usable_texts(config(tmp_path, split="valid"), 0)


def test_a_folders_card_says_which_files_are_which_split(tmp_path):
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    (data / "a.csv").write_text("text\n1 1 1\n")
    (data / "b.csv").write_text("text\n2 2 2\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/b*\n{}---\n# Set\n"
    (tmp_path / "set" / "README.md").write_text(card.format(""))
    assert list(read_usable_texts(config(tmp_path / "set"), 0)) == ["2 2 2"]
    (data / "b.csv").write_text("text;n\n2 2, 2;1\n")
    (tmp_path / "set" / "README.md").write_text(card.format("  sep: ;\n"))
    assert list(read_usable_texts(config(tmp_path / "set"), 0)) == ["2 2, 2"]  # an option of the format counts


OUTSIDE = (
    "../outside/secret.jsonl",
    "{root}/outside/secret.jsonl",
    "http://127.0.0.1:{port}/x.jsonl",
    "data/../../outside/*",
)


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "pattern", [*OUTSIDE, "zip://x.jsonl::http://127.0.0.1:{port}/x.zip", "file://{root}/outside/secret.jsonl"]
)
@pytest.mark.parametrize("key", ["data_files: {}", "data_files: [{}]", "data_files: [{{split: train, path: [{}]}}]"])
def test_a_folder_names_no_file_outside_it_and_no_address(name, pattern, key, tmp_path, asked):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text('{"text": "a secret of this account"}\n')
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "own.jsonl").write_text('{"text": "1 1 1"}\n')
    named = key.format('"' + pattern.format(root=tmp_path, port=asked.server_port) + '"')
    yaml = f"configs:\n- config_name: default\n  {named}\n"
    (tmp_path / "set" / name).write_text(f"---\n{yaml}---\n" if name.endswith(".md") else yaml)
    with pytest.raises(InputError, match=r"prompts\.path=.*is named there and lies outside of it") as error:
        read_usable_texts(config(tmp_path / "set"), 0)
    assert "a secret" not in str(error.value) and asked.paths == []


@pytest.fixture
def asked(monkeypatch):
    """A server that notes what it is asked for."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.paths = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def test_a_hubs_data_set_has_its_revision_and_no_files_here(monkeypatch):
    asked = []

    def open_builder(path, **options):
        asked.append((path, options))
        return SimpleNamespace(
            config=SimpleNamespace(data_files={"train": ["hf://datasets/org/set/a.csv", "/etc/x.txt"]})
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", open_builder)
    with pytest.raises(InputError, match="prompts.path=org/set: '/etc/x.txt' is named there and lies outside of it"):
        read_usable_texts(config("org/set", revision="v1", subset="fr"), 0)
    assert asked == [("org/set", {"name": "fr", "revision": "v1"})]


def test_links_that_leave_a_folder_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("a secret of this account\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="lies outside of it"):
        read_usable_texts(config(tmp_path / "set"), 0)
    (tmp_path / "set" / "real.txt").write_text("1 1 1\n")
    (tmp_path / "set" / "train.txt").unlink()
    (tmp_path / "set" / "train.txt").symlink_to("real.txt")  # to another file of the folder
    (tmp_path / "link").symlink_to(tmp_path / "set")  # the folder itself
    assert list(read_usable_texts(config(tmp_path / "link"), 0)) == ["1 1 1"]


def test_a_snapshot_of_a_hub_links_to_its_own_blobs(tmp_path):
    repository = tmp_path / "datasets--org--set"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text('{"text": "1 1 1"}\n')
    (repository / "snapshots" / "c0ffee" / "train.jsonl").symlink_to("../../blobs/abc")
    assert list(read_usable_texts(config(repository / "snapshots" / "c0ffee"), 0)) == ["1 1 1"]


def test_records_of_save_to_disk_name_no_file_outside(tmp_path):
    datasets.Dataset.from_dict({"text": ["a secret of this account"]}).save_to_disk(tmp_path / "other")
    datasets.Dataset.from_dict({"text": ["1 1 1"]}).save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    for name in ("../other/data-00000-of-00001.arrow", str(tmp_path / "other" / "data-00000-of-00001.arrow")):
        state["_data_files"] = [{"filename": name}]
        (tmp_path / "set" / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match="lies outside of it"):
            read_usable_texts(config(tmp_path / "set"), 0)
    for broken in ("[]", "{}", '{"_data_files": 3}', "[" * 100_000, "torn"):
        (tmp_path / "set" / "state.json").write_text(broken)
        with pytest.raises(InputError, match="set: cannot be read: "):
            read_usable_texts(config(tmp_path / "set"), 0)


BOMB = """
import resource, sys
from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.texts import read_usable_texts
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]) << 20, int(sys.argv[2]) << 20))
try:
    print(read_usable_texts(PromptsConfig(path=sys.argv[1], min_chars=3), 0).describe())
except InputError as error:
    print("refused:", error)
"""


def read_in(mebibytes, path):
    """Read in a process whose memory is limited; return what it says."""
    command = [sys.executable, "-c", BOMB, str(path), str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_text_that_is_there_often_is_held_once(tmp_path):
    table = pa.table({"text": pa.array(["x" * 8000, "y" * 8000] * 40_000)})  # 640 MB
    pq.write_table(table, tmp_path / "t.parquet")
    pq.write_table(table, tmp_path / "plain.parquet", use_dictionary=False, compression="zstd", row_group_size=5000)
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    del table
    for path in ("t.parquet", "plain.parquet", "set"):
        said = read_in(500, tmp_path / path)
        assert "2 texts of" in said and "79,998 repeated" in said


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz", "json.zst", "txt.zst", "csv.gz", "blank.txt.zst"])
def test_a_small_file_that_unpacks_to_too_much_is_refused(kind, tmp_path):
    texts = [f"{number:09d}" * 800 for number in range(12_000)]  # 86 MB
    path = tmp_path / f"t.{kind}"
    if kind in ("parquet", "arrow"):
        schema = pa.schema({"text": pa.string()})
        writer = pq.ParquetWriter(path, schema, compression="zstd") if kind == "parquet" else None
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with writer or pa.ipc.new_file(str(path), schema, options=options) as sink:
            for start in range(0, len(texts), 1000):
                sink.write_batch(pa.record_batch({"text": texts[start : start + 1000]}))
    else:
        rows = {
            "jsonl.gz": ('{"text": "%s"}\n', ""),
            "json.zst": ('[{"text": "%s"}],', "[0]"),
            "csv.gz": ("%s\n", "text\n"),
        }
        row, around = rows.get(kind, ("%s\n", ""))
        with pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[kind.rpartition(".")[2]]) as sink:
            sink.write(around[:1].encode() if kind == "json.zst" else around.encode())
            for text in [""] if kind == "blank.txt.zst" else texts:
                sink.write((row % text).encode() * (100_000_000 if kind == "blank.txt.zst" else 1))
    assert path.stat().st_size < 3 << 20
    said = read_in(900, path)
    assert said.startswith("refused: ") and "unpack to more than" in said and "write them less compressed" in said


def test_a_large_file_of_short_lines_is_no_bomb(tmp_path):
    (tmp_path / "t.txt").write_text("abcd\n" + "\n" * 2_000_000)
    assert read_usable_texts(config(tmp_path / "t.txt"), 0).left_out.blank == 2_000_000


FRUGAL = """
import resource, sys
from pathlib import Path
from ppo_ray.config import PromptsConfig
from ppo_ray.prompts.stream import PromptStream
class Letters:
    def __call__(self, texts, **options):
        return {"input_ids": [[ord(letter) for letter in text[:9]] for text in texts]}
import pyarrow.csv, pyarrow.parquet
held = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (int(sys.argv[2]) << 20),) * 2)
stream = PromptStream(PromptsConfig(path=sys.argv[1], keep=["answer"]), Letters(), 0, num_held_out=50)
batch = stream.take(200)
rows = zip(batch.prompt_ids, batch.columns.column("row").to_pylist(), strict=True)
print(stream.describe(), {"".join(map(chr, ids)) == f"{row['answer']:09d}" for ids, row in rows})
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_data_set_is_not_held_in_memory(kind, tmp_path):
    path, count, size = tmp_path / f"t.{kind}", 15_000, 10_000  # 150 MB, each text another one
    texts = (f"{number:09d}" + "x" * size for number in range(count))
    if kind == "jsonl":
        with path.open("w") as sink:
            for number, text in enumerate(texts):
                sink.write(json.dumps({"text": text, "answer": number}) + "\n")
    else:
        schema = pa.schema({"text": pa.string(), "answer": pa.int64()})
        writer = pq.ParquetWriter(path, schema) if kind == "parquet" else pa.ipc.new_file(str(path), schema)
        with writer as sink:
            for start in range(0, count, 1000):
                rows = {"text": list(itertools.islice(texts, 1000)), "answer": range(start, start + 1000)}
                sink.write_table(pa.table(rows, schema))
    command = [sys.executable, "-c", FRUGAL, str(path), "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"15,000 texts of {path} {{True}}\n"
