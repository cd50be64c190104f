import pytest
import yaml

from ppo_ray.config import Config, load_evaluation_config
from ppo_ray.config.evaluation import _SAID, _TAKEN, _TAKEN_SECTIONS
from ppo_ray.config.explain import all_options
from ppo_ray.errors import InputError


@pytest.fixture
def checkpoint(tmp_path):
    """Return a function that writes a checkpoint's config.yaml and returns the folder."""

    def write(**sections):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"prompts": {"path": "p.parquet"}, **sections}))
        return tmp_path

    return write


def test_what_an_evaluation_needs_is_taken(checkpoint):
    folder = checkpoint(
        prompts={"path": "p.parquet", "column": "review", "min_chars": 7},
        reward={"path": "classifier", "label": "GOOD", "transform": "sigmoid"},
        rollout={"temperature": 0.7, "engine": "hf", "max_response_tokens": 9},
        evaluation={"num_prompts": 12, "num_samples": 3},
        model={"path": "elsewhere", "dtype": "bfloat16"},
        seed=5,
    )
    config, dropped = load_evaluation_config(folder)
    assert (config.prompts.column, config.prompts.min_chars, config.seed) == ("review", 7, 5)
    assert (config.reward.path, config.reward.label, config.reward.transform) == ("classifier", "GOOD", "sigmoid")
    assert (config.rollout.temperature, config.rollout.engine, config.rollout.max_response_tokens) == (0.7, "hf", 9)
    assert (config.evaluation.num_prompts, config.model.dtype, config.model.path) == (12, "bfloat16", str(folder))
    assert dropped == []


def test_a_checkpoint_of_adapters_is_evaluated_on_its_base(checkpoint):
    folder = checkpoint(model={"path": "base", "lora": {"rank": 4}}, reward={"path": "c"})
    (folder / "adapter_config.json").write_text("{}")
    config, _ = load_evaluation_config(folder)
    assert (config.model.path, config.model.lora.path, config.model.lora.rank) == ("base", str(folder), None)
    config, _ = load_evaluation_config(folder, ["model.path=elsewhere"])
    assert (config.model.path, config.model.lora.path) == ("elsewhere", str(folder))
    quantised = {"path": "base", "lora": {"rank": 4}, "quantization": "int8"}
    checkpoint(model=quantised, learner={"gpus": 1.0}, reward={"path": "c"})
    assert load_evaluation_config(folder)[0].model.quantization == "int8"  # the policy is that of the codes
    checkpoint(model={"path": "${oc.env:HOME}"}, reward={"path": "c"})
    with pytest.raises(InputError, match=r"model.path holds an interpolation"):
        load_evaluation_config(folder)


def test_sets_and_mixtures_are_taken_and_a_path_given_stands_for_the_mixture(checkpoint):
    sources = [{"name": "a", "path": "a.jsonl", "weight": 2.0}, {"name": "b", "path": "b.jsonl"}]
    sets = {"hard": {"path": "hard.jsonl", "num_prompts": 7}}
    folder = checkpoint(
        prompts={"path": None, "sources": sources}, evaluation={"sets": sets}, reward={"path": "c", "judge": None}
    )
    config, dropped = load_evaluation_config(folder)
    assert (config.prompts.quotas, config.evaluation.sets["hard"].num_prompts, dropped) == ((2, 1), 7, [])
    given, _ = load_evaluation_config(folder, ["prompts.path=other.jsonl"])
    assert (given.prompts.path, given.prompts.sources) == ("other.jsonl", ())


def test_a_judge_of_the_file_is_not_asked(checkpoint):
    judge = {"path": "judge", "prompt": "/etc/passwd", "pattern": "(x)"}
    folder = checkpoint(reward={"path": None, "judge": judge})
    with pytest.raises(InputError, match=r"reward.judge=.*, a model and files that are not read because a checkpoint"):
        load_evaluation_config(folder)
    config, dropped = load_evaluation_config(folder, ["reward.path=c"])
    assert config.reward.judge is None and dropped[0].startswith("reward.judge=")


def test_nothing_of_the_file_runs_code_trusts_files_or_connects(checkpoint):
    hostile = {
        "model": {"path": "m", "trust_remote_code": True, "allow_pickled_weights": True, "reference_path": "other"},
        "reward": {"path": "c", "trust_remote_code": True, "allow_pickled_weights": True},
        "ray": {"address": "192.0.2.1:6379"},
    }
    config, dropped = load_evaluation_config(checkpoint(**hostile))
    assert not config.model.trust_remote_code and not config.model.allow_pickled_weights
    assert not config.reward.trust_remote_code and not config.reward.allow_pickled_weights
    assert config.ray.address is None and config.model.reference_path is None
    assert dropped == [
        "model.trust_remote_code=True",
        "model.allow_pickled_weights=True",
        "reward.trust_remote_code=True",
        "reward.allow_pickled_weights=True",
        "ray.address=192.0.2.1:6379",
    ]


def test_what_the_command_line_gives_counts_and_is_not_reported(checkpoint):
    folder = checkpoint(model={"path": "m", "trust_remote_code": True}, reward={"path": "c"})
    config, dropped = load_evaluation_config(folder, ["model.trust_remote_code=true", "ray.address=auto"])
    assert config.model.trust_remote_code and config.ray.address == "auto"
    assert dropped == []


def test_a_function_that_the_file_names_is_not_called(checkpoint):
    folder = checkpoint(reward={"function": "pty:spawn"})
    with pytest.raises(InputError, match=r"reward.function=pty:spawn, code that is not run"):
        load_evaluation_config(folder)
    config, _ = load_evaluation_config(folder, ["reward.function=mine:score"])
    assert config.reward.function == "mine:score"
    config, dropped = load_evaluation_config(folder, ["reward.path=classifier"])
    assert config.reward.function is None and dropped == ["reward.function=pty:spawn"]


def test_a_function_on_the_command_line_replaces_the_files_classifier(checkpoint):
    config, _ = load_evaluation_config(checkpoint(reward={"path": "c"}), ["reward.function=mine:score"])
    assert (config.reward.path, config.reward.function) == (None, "mine:score")


def test_a_server_that_the_file_names_is_sent_nothing(checkpoint):
    folder = checkpoint(reward={"url": "https://stranger.example.org/score", "token_env": "HF_TOKEN"})
    with pytest.raises(
        InputError, match=r"reward.url=https://stranger.example.org/score, a server that is sent nothing"
    ):
        load_evaluation_config(folder)
    config, dropped = load_evaluation_config(folder, ["reward.path=classifier"])
    assert (config.reward.url, config.reward.token_env) == (None, None)
    assert dropped == ["reward.url=https://stranger.example.org/score"]
    config, dropped = load_evaluation_config(folder, ["reward.url=https://mine.example.org/"])
    assert (config.reward.url, config.reward.token_env, dropped) == ("https://mine.example.org/", None, [])
    config, _ = load_evaluation_config(checkpoint(reward={"path": "c"}), ["reward.url=https://mine.example.org/"])
    assert config.reward.path is None


def test_a_revision_goes_with_its_path(checkpoint):
    folder = checkpoint(
        model={"path": "m", "revision": "v0"},
        reward={"path": "c", "revision": "v1"},
        prompts={"path": "p", "revision": "v2"},
    )
    config, _ = load_evaluation_config(folder)
    assert config.model.revision is None  # the checkpoint is a folder
    assert (config.reward.revision, config.prompts.revision) == ("v1", "v2")
    config, _ = load_evaluation_config(folder, ["reward.path=other", "prompts.path=others", "prompts.revision=v3"])
    assert (config.reward.revision, config.prompts.revision) == (None, "v3")
    config, _ = load_evaluation_config(folder, ["reward.function=mine:score"])
    assert config.reward.revision is None


def test_the_file_reads_no_environment_variable(checkpoint, monkeypatch):
    monkeypatch.setenv("PRIVATE_NAME", "hidden")
    with pytest.raises(InputError, match="prompts.path holds an interpolation") as refusal:
        load_evaluation_config(checkpoint(prompts={"path": "${oc.env:PRIVATE_NAME}"}, reward={"path": "c"}))
    assert "hidden" not in str(refusal.value)


def test_every_option_that_could_do_harm_is_known_here():
    """A new option of these sections is either taken on purpose or left out; it cannot slip in."""
    names = {name for name, _ in all_options(Config)}
    assert set(_TAKEN) | set(_SAID) <= names
    assert not set(_TAKEN) & set(_SAID)
    assert not {"model", "reward", "ray", "learner", "rollout"} & set(_TAKEN_SECTIONS)


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no checkpoint of ppo_ray"):
        load_evaluation_config(tmp_path)
