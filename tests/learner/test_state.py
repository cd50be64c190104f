"""A learner that is saved and loaded goes on as if nothing had been: bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.errors import CheckpointError, InputError, NonFiniteError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.trl import AutoModelForCausalLMWithValueHead
from tests.learning import largest_difference, make_table, weights

OPTIONS = UpdateConfig(
    learning_rate=1e-3, score_scaling="mean_std", kl_horizon=50.0, warmup_steps=3, value_warmup_steps=1, epochs=2
)


def load(model: ModelConfig, checkpoint: Path | None = None, ppo: UpdateConfig = OPTIONS) -> PPOLearner:
    return PPOLearner.load(
        model, ppo, LearnerConfig(), temperature=1.0, device="cpu", num_steps=9, checkpoint=checkpoint
    )


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_two_steps_are_one_and_one(tiny_policy: Path, tmp_path: Path, critic: str) -> None:
    model = ModelConfig(path=str(tiny_policy), critic=critic)
    through, first = load(model), load(model)
    tables = [make_table(8), make_table(7), make_table(9)]
    for step in (0, 1):
        through.update(tables[step], step)
        first.update(tables[step], step)
    first.save(tmp_path / "checkpoint")
    again = load(model, tmp_path / "checkpoint")
    assert (again.policy_version, again.kl_coef) == (2, through.kl_coef)
    expected, found = through.update(tables[2], 2), again.update(tables[2], 2)
    seconds = {name for name in expected.metrics if name.startswith("time/")}
    assert {k: v for k, v in found.metrics.items() if k not in seconds} == {
        k: v for k, v in expected.metrics.items() if k not in seconds
    }
    assert found.trajectories.equals(expected.trajectories)
    assert largest_difference(weights(through), weights(again)) == 0
    assert through.weights().checksum == again.weights().checksum
    again.save(tmp_path / "again")
    through.save(tmp_path / "through")
    names = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert Path("learner/optimizer.safetensors") in names and len(names) >= 7
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "through" / name).read_bytes(), name


def test_a_checkpoint_is_a_model_as_it_lies(tiny_policy: Path, tmp_path: Path) -> None:
    learner = load(ModelConfig(path=str(tiny_policy)))
    learner.update(make_table(8), 1)
    learner.save(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert largest_difference(weights(learner), {name: tensor.detach() for name, tensor in loaded.items()}) == 0
    assert not [path for path in tmp_path.glob("*.safetensors") if path.name != "model.safetensors"]  # vLLM reads all
    assert {name.partition(":")[0] for name in load_file(tmp_path / "learner" / "optimizer.safetensors")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


def test_weights_that_are_not_those_that_were_saved(tiny_policy: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_policy))
    load(model).save(tmp_path)
    state = json.loads((tmp_path / "learner" / "state.json").read_text())
    (tmp_path / "learner" / "state.json").write_text(json.dumps(state | {"weights_checksum": "0"}))
    with pytest.raises(CheckpointError, match="are not those that were saved"):
        load(model, tmp_path)


def test_another_reference_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_policy, other)
    model = ModelConfig(path=str(tiny_policy), reference_path=str(other))
    load(model).save(tmp_path / "checkpoint")
    changed = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    changed.save_pretrained(other)
    with pytest.raises(InputError, match=r"the reference model \(.*other\) is not the one that the run began with"):
        load(model, tmp_path / "checkpoint")


def test_an_update_that_was_not_finished_is_not_saved(tiny_policy: Path, tmp_path: Path) -> None:
    learner = load(ModelConfig(path=str(tiny_policy)), ppo=OPTIONS.model_copy(update={"score_scaling": "none"}))
    with pytest.raises(NonFiniteError):
        learner.update(make_table(4, [3e38, -3e38, 3e38, -3e38]), 1)
    with pytest.raises(CheckpointError, match="was not finished"):
        learner.save(tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{")])
@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
def test_a_part_that_cannot_be_read_is_named(tiny_policy: Path, tmp_path: Path, name: str, damage) -> None:
    model = ModelConfig(path=str(tiny_policy))
    load(model).save(tmp_path)
    damage(tmp_path / "learner" / name)
    with pytest.raises(CheckpointError, match=name):
        load(model, tmp_path)


UNSAVABLE = [
    {"temperature": 0.9, "top_p": 0.6},  # as Llama 2's chat models have it, without do_sample
    {"temperature": 0.0, "do_sample": False},
    {"top_k": 20},
    {"length_penalty": 0.9},
]


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("options", UNSAVABLE)
def test_the_users_generation_config_is_kept_to_the_byte(tiny_policy: Path, tmp_path: Path, options, critic) -> None:
    source = Path(shutil.copytree(tiny_policy, tmp_path / "source"))
    content = json.dumps(options | {"eos_token_id": [0, 3], "odd": 1}, indent=7)
    (source / "generation_config.json").write_text(content)
    learner = load(ModelConfig(path=str(source), critic=critic))
    (source / "generation_config.json").write_text("{}")  # the folder may change, or go, while a run goes on
    learner.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").read_text() == content
    again = load(ModelConfig(path=str(source), critic=critic), tmp_path / "saved")
    assert largest_difference(weights(learner), weights(again)) == 0
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "generation_config.json").read_text() == content


@pytest.mark.parametrize("options", UNSAVABLE)
def test_generation_options_of_an_old_config_are_saved_too(tiny_policy: Path, tmp_path: Path, options) -> None:
    source = Path(shutil.copytree(tiny_policy, tmp_path / "source"))
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | options))
    load(ModelConfig(path=str(source))).save(tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: found[name] for name in options if name != "do_sample"} == {
        name: value for name, value in options.items() if name != "do_sample"
    }


def test_what_could_not_be_saved_at_the_end_is_refused_at_the_start(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: object, **options: object) -> None:
        raise RuntimeError("this tokenizer cannot be saved\nnot at all")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    message = r"no checkpoint could be written of the model .*RuntimeError: this tokenizer cannot be saved\. Mend"
    with pytest.raises(InputError, match=message):
        load(ModelConfig(path=str(tiny_policy)))


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_model_that_trl_saved_comes_with_its_value_head(
    tiny_policy: Path, tmp_path: Path, critic, shard_size
) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy)
    torch.nn.init.constant_(model.v_head.summary.bias, 25.0)
    model.save_pretrained(tmp_path / "trl", max_shard_size=shard_size)
    for file in tiny_policy.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "trl")
    learner = load(ModelConfig(path=str(tmp_path / "trl"), critic=critic, reference_path=str(tmp_path / "trl")))
    for name, wanted in model.v_head.summary.state_dict().items():
        assert torch.equal(torch.from_numpy(learner.value_head()[name]), wanted)
    report = learner.update(make_table(4), 1)
    assert report.metrics["value/mean"] == pytest.approx(25, abs=3)
    learner.save(tmp_path / "saved")  # in the run's own format: engines would not take the head among the weights
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in saved if name.startswith("v_head")]
    again = load(ModelConfig(path=str(tmp_path / "trl"), critic=critic), tmp_path / "saved")
    assert again.value_head()["bias"] == learner.value_head()["bias"] != 25.0


def test_a_value_head_of_another_kind_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_policy, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for head, words in (
        (
            {"v_head.0.weight": torch.zeros(9, 128)},
            r"holds {'v_head.0.weight': \(9, 128\)}, this model needs",
        ),
        (
            {"v_head.summary.weight": torch.zeros(1, 128)},
            r"\(v_head\.\*\) holds {'weight': \(1, 128\)}, this model",
        ),
        (
            {"v_head.summary.weight": torch.full((1, 128), torch.nan), "v_head.summary.bias": torch.zeros(1)},
            "holds NaN or infinite weights",
        ),
    ):
        save_file(tensors | head, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=words):
            load(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_value_head_of_zeros_foresees_nothing_and_learns(tiny_policy: Path, tmp_path: Path, critic) -> None:
    model = ModelConfig(path=str(tiny_policy), critic=critic, value_head_init="zeros")
    learner = load(model)
    report = learner.update(make_table(4), 1)
    assert (report.metrics["value/mean"], report.metrics["value/std"]) == (0.0, 0.0)
    learner.save(tmp_path / "saved")
    again = load(model, tmp_path / "saved")  # a head that was trained stays as it is
    assert again.value_head()["bias"] == learner.value_head()["bias"] != 0
