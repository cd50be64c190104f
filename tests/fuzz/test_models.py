"""Hostile or damaged models, weights and trajectories: the right value, or one clear error, in bounded time."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings

from ppo_ray import trajectory
from ppo_ray.config import Config, Trust, load_config
from ppo_ray.errors import CheckpointError, InputError, WorkerError
from ppo_ray.learner.state import read_ahead
from ppo_ray.models.folder import read_config
from ppo_ray.models.loading import load_causal_lm
from ppo_ray.preflight import check
from ppo_ray.weights.snapshot import WeightSnapshot, Wire
from tests.fuzz.mutations import damaged, json_values, mutated
from tests.fuzz.test_records import LONGEST_MESSAGE

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
COUNTS = st.sampled_from([0, -1, 1, 7, 10**5 + 1, 10**9, 2**62, 2**70, 1.5, "3", None, True, [2], {"a": 1}])
EXAMPLES = settings.default.max_examples // 4  # a model is loaded for each


@pytest.fixture(scope="module")
def config(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_policy, home / "policy")
    pq.write_table(pa.table({"text": ["a film of people", "another film"]}), home / "p.parquet")
    (home / "judge_of_fuzz.py").write_text("def score(prompts, responses): return [0.0] * len(prompts)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        yield load_config(
            None,
            [
                *(f"output_dir={home / 'run'}", f"model.path={home / 'policy'}", f"prompts.path={home / 'p.parquet'}"),
                *("prompts.min_chars=0", "evaluation.num_prompts=0", "evaluation.num_samples=0"),
                *(
                    "reward.function=judge_of_fuzz:score",
                    "prompts.max_tokens=8",
                    "rollout.max_response_tokens=16",
                    "learner.threads=1",
                ),
            ],
        )


def look(config: Config, source: Path, name: str, content: bytes) -> None:
    """Check a config whose policy has one hostile file."""
    file = Path(config.model.path) / name
    file.write_bytes(content)
    try:
        inputs = check(config)
    except InputError as error:
        assert len(str(error)) < LONGEST_MESSAGE
    else:
        assert inputs.vocab_size > 0 and callable(inputs.tokenizer) and inputs.end_tokens is not None
    finally:
        shutil.copyfile(source / name, file)


def test_the_model_that_is_damaged_is_right(config: Config) -> None:
    """Else the tests below would damage something that is refused anyway."""
    assert check(config).vocab_size == 512


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_files_of_a_model(config: Config, tiny_policy: Path, name: str, data: st.DataObject) -> None:
    content = (tiny_policy / name).read_bytes()
    look(config, tiny_policy, name, data.draw(st.one_of(mutated(json.loads(content)), damaged(content))))


@settings(max_examples=EXAMPLES)
@given(data=st.data(), value=st.one_of(COUNTS, json_values))
def test_options_of_a_models_config(config: Config, tiny_policy: Path, data: st.DataObject, value: Any) -> None:
    content = json.loads((tiny_policy / "config.json").read_text())
    extra = ["num_labels", "id2label", "auto_map", "torch_dtype", "quantization_config", "text_config", "_name_or_path"]
    content[data.draw(st.sampled_from([*content, *extra]))] = value
    look(config, tiny_policy, "config.json", json.dumps(content).encode())


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_local_experts"])
def test_a_config_that_asks_for_a_billion_parts_is_refused(tiny_policy: Path, tmp_path: Path, key: str) -> None:
    content = json.loads((tiny_policy / "config.json").read_text())
    shutil.copytree(tiny_policy, tmp_path / "policy")
    for options in (content | {key: 10**9}, content | {"text_config": {key: 10**9}}):
        (tmp_path / "policy" / "config.json").write_text(json.dumps(options))
        model, problem = read_config("model.path", str(tmp_path / "policy"), Trust())
        assert model is None and f"config.json asks for {key}=1e+09; the limit is 100,000" in problem


@settings(max_examples=EXAMPLES)
@given(content=st.data())
def test_weights(config: Config, tiny_policy: Path, content: st.DataObject) -> None:
    """Of safetensors the header is what is damaged most."""
    file = Path(config.model.path) / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    headers = mutated(header).map(lambda raw: len(raw).to_bytes(8, "little") + raw)
    file.write_bytes(content.draw(st.one_of(damaged(whole[:end]), headers)) + whole[end:])
    try:
        model = load_causal_lm(config.model.path)
    except InputError as error:
        assert len(str(error)) < LONGEST_MESSAGE
    else:
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    finally:
        shutil.copyfile(tiny_policy / "model.safetensors", file)


@given(content=st.binary(max_size=300), name=st.sampled_from(FILES))
@settings(max_examples=EXAMPLES)
def test_any_bytes_for_a_models_file(config: Config, tiny_policy: Path, content: bytes, name: str) -> None:
    look(config, tiny_policy, name, content)


TENSORS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(5)), ("c", torch.zeros(4, dtype=torch.int64))]
SNAPSHOT = WeightSnapshot.take(TENSORS, 3, Wire(bucket_bytes=64))
INTEGERS = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**62, 2**70, -(2**63)]))
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=5),
        "dtype": st.sampled_from(
            ["float32", "int64", "bfloat16", "float64", "uint8", "no_such", "nn", "", "float4_e2m1fn_x2"]
        ),
        "shape": st.lists(INTEGERS, max_size=4).map(tuple),
        "checksum": st.text(max_size=20),
        "bucket": INTEGERS,
        "offset": INTEGERS,
    },
)


@given(changes=st.lists(CHANGES, min_size=3, max_size=3), order=st.permutations(range(3)), cut=st.integers(0, 3))
def test_a_manifest_of_weights(changes: list[dict[str, Any]], order: list[int], cut: int) -> None:
    entries = [replace(entry, **change) for entry, change in zip(SNAPSHOT.manifest.entries, changes, strict=True)]
    manifest = replace(SNAPSHOT.manifest, entries=tuple(entries[index] for index in order)[: 3 - cut // 2])
    received = WeightSnapshot(manifest, SNAPSHOT.buckets[: len(SNAPSHOT.buckets) - cut % 2])
    try:
        found = list(received.tensors())
    except WorkerError as error:
        assert "arrived damaged" in str(error) and len(str(error)) < LONGEST_MESSAGE
    else:  # then they are the bytes that were sent, whatever they are called
        sent = {entry.checksum: tensor for entry, (_, tensor) in zip(SNAPSHOT.manifest.entries, TENSORS, strict=True)}
        for entry, (name, tensor) in zip(manifest.entries, found, strict=True):
            assert name == entry.name and (entry.checksum in sent or tensor.numel() == 0)
            if tensor.numel():
                assert (
                    tensor.contiguous().view(torch.uint8).flatten().tolist()
                    == sent[entry.checksum].contiguous().view(torch.uint8).flatten().tolist()
                )


ROWS = [
    {
        **{
            "sample_id": number,
            "step": 1,
            "policy_version": 1,
            "worker": "rollout-0",
            "seed": 7,
            "finish_reason": "stop",
        },
        **{"prompt": "a film", "response": "good", "prompt_ids": [1, 2], "response_ids": [3] * (number + 1)},
        **{"rollout_logprobs": [-0.5] * (number + 1), "score": 0.5, "truncated": None},
    }
    for number in range(4)
]


def as_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_trajectories(folder: Path, content: bytes) -> None:
    (folder / "ahead.parquet").write_bytes(content)
    try:
        table = read_ahead(folder)
    except CheckpointError as error:
        assert "ahead.parquet cannot be read: " in str(error) and len(str(error)) < LONGEST_MESSAGE
    else:
        trajectory.validate(table)
        for ids, logprobs in zip(
            trajectory.ragged(table, "response_ids"), trajectory.ragged(table, "rollout_logprobs"), strict=True
        ):
            assert len(ids) == len(logprobs) > 0
        assert isinstance(table.to_pylist(), list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectories")


def test_trajectories_are_read_as_they_were_written(folder: Path) -> None:
    (folder / "ahead.parquet").write_bytes(as_parquet(trajectory.from_rows(ROWS)))
    assert read_ahead(folder).to_pylist() == ROWS


@given(content=damaged(as_parquet(trajectory.from_rows(ROWS))))
def test_damaged_trajectories(folder: Path, content: bytes) -> None:
    read_trajectories(folder, content)


@given(data=st.data())
def test_trajectories_of_other_columns(folder: Path, data: st.DataObject) -> None:
    """Valid files that are not what the exchange promises: columns left out, twice, null, of other types or lengths."""
    table = trajectory.from_rows(ROWS)
    index = data.draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[index]
    columns = {
        "nulls": pa.nulls(4, table.schema.field(index).type),
        "text": pa.array(["x"] * 4),
        "lists": pa.array([[], [1], None, [2, 3]], pa.list_(pa.int32())),
        "floats": pa.array([[0.5], [], [0.5], None], pa.list_(pa.float32())),
        "large": pa.array([2**62] * 4),
    }
    kind = data.draw(st.sampled_from([*columns, "drop", "twice", "no metadata", "none"]))
    match kind:
        case "drop":
            table = table.drop_columns([name])
        case "twice":
            table = table.append_column(name, table.column(index))
        case "no metadata":
            table = table.replace_schema_metadata(None)
        case "none":
            table = table.slice(0, 0)
        case _:
            table = table.set_column(index, pa.field(name, columns[kind].type), columns[kind])
    read_trajectories(folder, as_parquet(table))


def test_trajectories_that_unpack_to_too_much_are_refused(folder: Path) -> None:
    rows = [ROWS[0] | {"prompt": f"{number:04d}" * 50_000} for number in range(1500)]  # 300 MB
    (folder / "ahead.parquet").write_bytes(as_parquet(trajectory.from_rows(rows)))
    assert (folder / "ahead.parquet").stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="bytes unpack to"):
        read_ahead(folder)
