"""What the ranks of a learner write together: each a part, all of it once, and exactly what one rank would write."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ppo_ray.errors import CheckpointError, InputError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.snapshot import _deal_out
from ppo_ray.learner.state import LearnerState
from ppo_ray.models.saving import TensorFile, find_parts, model_file, write_tensors
from ppo_ray.weights.checksums import weights_checksum
from tests.learning import largest_difference, load_learner, make_table, weights

MODEL: dict[str, Any] = {"dtype": "bfloat16", "critic": "separate"}
PPO = {"epochs": 2, "minibatch_size": 4}


def learner_of(ranks: Ranks | None, folder: Path, sharding: str, checkpoint: Path | None = None) -> PPOLearner:
    return load_learner(folder, MODEL, {"sharding": sharding, "microbatch_tokens": 40}, PPO, ranks, checkpoint)


def save(ranks: Ranks | None, folder: Path, sharding: str, begin: Path | None, end: Path) -> dict[str, torch.Tensor]:
    learner = learner_of(ranks, folder, sharding, begin)
    if begin is None:
        learner.update(make_table(7), 0)
    learner.save(end)
    return weights(learner)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, by file and name."""
    found: dict[str, torch.Tensor] = {}
    for name in ("model", "critic/model", "critic/value_head/value_head", "learner/optimizer"):
        for part in find_parts(folder / f"{name}.safetensors"):
            tensors = {f"{name}:{key}": tensor for key, tensor in load_file(part).items()}
            assert not tensors.keys() & found.keys()
            found |= tensors
    return found


@pytest.mark.parametrize(("sharding", "other"), [("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_parts_are_the_whole_for_any_ranks_and_sharding(
    tiny_policy: Path, crew: Any, tmp_path: Path, sharding: str, other: str
) -> None:
    first, alone, shared = (tmp_path / name for name in ("first", "alone", "shared"))
    after = crew.run(save, tiny_policy, sharding, None, first)
    assert all(isinstance(answer, dict) for answer in after), after
    parts = [len(find_parts(first / name)) for name in ("model.safetensors", "learner/optimizer.safetensors")]
    assert parts == [2, 3]  # the third has more of the critic's
    assert len(list(first.glob("*.safetensors"))) == 2  # vLLM reads all that lie there
    one = save(None, tiny_policy, "ddp", first, alone)
    again = crew.run(save, tiny_policy, other, first, shared)
    for found in (one, *again):
        assert not isinstance(found, str), found
        assert largest_difference(found, after[0]) == 0
    whole = read(alone)
    for folder in (first, shared):
        assert read(folder).keys() == whole.keys() and largest_difference(read(folder), whole) == 0
        state, wanted = (json.loads((path / "learner" / "state.json").read_text()) for path in (folder, alone))
        assert state == wanted  # checksums too: whoever owns a tensor, in whatever part it lies
    loaded = dict(AutoModelForCausalLM.from_pretrained(first).named_parameters())
    assert loaded.keys() == after[0].keys()
    assert all(torch.equal(tensor.bfloat16(), after[0][name]) for name, tensor in loaded.items())


def test_what_a_rank_cannot_write_is_an_error_on_all(tiny_policy: Path, crew: Any, tmp_path: Path) -> None:
    (tmp_path / "learner" / "optimizer-00002-of-00003.safetensors").mkdir(parents=True)
    answers = crew.run(save, tiny_policy, "ddp", None, tmp_path)
    kinds = [answer.partition(":")[0] for answer in answers]
    assert kinds == ["OSError", "IsADirectoryError", "OSError"], answers
    assert "rank 1, writing into" in answers[0] and "Is a directory" in answers[0]
    assert not (tmp_path / "learner" / "state.json").exists()


@pytest.mark.parametrize("damage", ["", "weights_checksum", "reference_checksum"])
def test_a_checkpoint_of_an_older_version_is_taken(tiny_policy: Path, tmp_path: Path, damage: str) -> None:
    """It has one file of each kind, and checksums over all bytes in a row."""
    learner = learner_of(None, tiny_policy, "ddp")
    learner.update(make_table(7), 0)
    learner.save(tmp_path)
    path = tmp_path / "learner" / "state.json"
    state = json.loads(path.read_text())
    del state["by_tensor"]
    state["weights_checksum"] = weights_checksum(learner.named_weights())
    state["reference_checksum"] = weights_checksum(learner._reference.named_weights())
    path.write_text(json.dumps(state | ({damage: "0"} if damage else {})))
    if damage:
        with pytest.raises((CheckpointError, InputError), match="are not those that were saved|is not the one that"):
            learner_of(None, tiny_policy, "ddp", tmp_path)
        return
    again = learner_of(None, tiny_policy, "ddp", tmp_path)
    assert largest_difference(weights(learner), weights(again)) == 0
    again.save(tmp_path / "again")
    assert LearnerState.read(tmp_path / "again").by_tensor


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=8,
    )
)
def test_a_file_is_to_the_byte_what_the_library_writes(layout: dict[str, Any]) -> None:
    tensors = {name: torch.ones(shape).cumsum(0).to(dtype) for name, (dtype, shape) in layout.items()}
    with tempfile.TemporaryDirectory() as folder:
        written = write_tensors(Path(folder) / "x", tensors)
        content = (Path(folder) / "x").read_bytes()
    assert content == safetensors.torch.save(tensors, {"format": "pt"})
    assert written.size == len(content) and sorted(written.names) == sorted(tensors)


def test_experts_that_a_model_keeps_together_lie_apart_in_its_files(tmp_path: Path) -> None:
    """A rank's part has whole layers, of which transformers makes the tensors of its files."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    file = model_file(model, Path(), model.state_dict(keep_vars=True))
    owners = _deal_out([file], 3)
    wanted, found = load_file(tmp_path / "theirs" / "model.safetensors"), {}
    for rank in range(3):
        own = {name: tensor.detach() for name, tensor in file.tensors.items() if owners[id(tensor)] == rank}
        part = file.rename(own)
        assert part and not part.keys() & found.keys()
        found |= part
    assert found.keys() == wanted.keys() and largest_difference(found, wanted) == 0


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_tensors_are_dealt_out_evenly_and_alike(sizes: list[int], ranks: int) -> None:
    tensors = {f"w{index}": torch.empty(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    owners = _deal_out([TensorFile(Path("x"), tensors | {"tied": tensors["w0"]})], ranks)
    dealt = [0] * ranks
    for tensor in tensors.values():
        dealt[owners[id(tensor)]] += len(tensor)
    assert sum(dealt) == sum(sizes) and max(dealt) - min(dealt) <= max(sizes)
