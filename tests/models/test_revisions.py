"""The revision of a hub name goes wherever the name goes: the hub of these tests has no newest commit instead."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError, WorkerError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.loading import load_actor_critic, load_reference
from ppo_ray.learner.reader import Reader
from ppo_ray.plan import ModelSizes
from ppo_ray.preflight import check
from ppo_ray.reward.classifier import Classifier
from ppo_ray.rollout.hf import HFEngine

FIRST, SECOND = "a1" * 20, "b2" * 20


@pytest.fixture
def hub(tiny_policy: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a hub's cache of a policy and a classifier, two commits each and no branch."""
    for name, source in (("policy", tiny_policy), ("classifier", tiny_classifier)):
        for number, commit in enumerate((FIRST, SECOND), 1):
            folder = tmp_path / f"models--org--{name}" / "snapshots" / commit
            shutil.copytree(source, folder)
            tensors = load_file(folder / "model.safetensors")
            tensors = {
                key: tensor * number if key.endswith("norm.weight") else tensor for key, tensor in tensors.items()
            }
            if name == "policy":
                tensors |= {
                    "v_head.summary.weight": torch.full((1, 128), float(number)),
                    "v_head.summary.bias": torch.zeros(1),
                }
                (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [number]}))
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def configured(tmp_path: Path, *overrides: str) -> Config:
    pq.write_table(pa.table({"text": [f"a film of {number} people" for number in range(9)]}), tmp_path / "p.parquet")
    return load_config(
        None,
        [
            *("model.path=org/policy", f"model.revision={FIRST}", f"output_dir={tmp_path / 'run'}"),
            *("model.reference_path=org/policy", f"model.reference_revision={SECOND}"),
            *(
                "reward.path=org/classifier",
                f"reward.revision={FIRST}",
                "evaluation.num_prompts=1",
                "evaluation.num_samples=0",
            ),
            *(
                f"prompts.path={tmp_path / 'p.parquet'}",
                "prompts.min_chars=0",
                *("prompts.max_tokens=8", "rollout.max_response_tokens=16"),
                "learner.threads=1",
            ),
            *overrides,
        ],
    )


def norm(model: torch.nn.Module) -> float:
    (weight,) = [tensor for name, tensor in model.named_parameters() if name.endswith("model.norm.weight")]
    return float(weight.flatten()[0])


def test_config_tokenizer_weights_and_value_head_are_those_of_the_revision(hub: Path, tmp_path: Path) -> None:
    config = configured(tmp_path)
    inputs = check(config)
    assert inputs.tokenizer is not None and inputs.end_tokens.ids == (0, 1)  # the tokenizer's, and this commit's
    assert len(ModelSizes.read(config).classifiers) == 1
    learner = PPOLearner.load(config.model, config.ppo, config.learner, temperature=1.0, seed=0, num_steps=2)
    assert float(learner.value_head()["weight"].flatten()[0]) == 1.0
    policy = load_actor_critic(config.model, 1.0, 0, Reader(torch.device("cpu")))
    reference = load_reference(config.model, 1.0, Reader(torch.device("cpu")))
    assert (norm(policy.causal_lm), norm(reference)) == (1.0, 2.0)
    HFEngine("org/policy", trust=config.model.trust).close()
    assert Classifier("org/classifier", trust=config.reward.trust).score(["a film"])[0] is not None


def test_a_separate_critic_has_its_own(hub: Path, tmp_path: Path) -> None:
    critic = ("model.critic=separate", "model.critic_path=org/policy", f"model.critic_revision={SECOND}")
    config = configured(tmp_path, *critic)
    check(config)
    policy = load_actor_critic(config.model, 1.0, 0, Reader(torch.device("cpu")))
    assert norm(policy.causal_lm) == 1.0 and float(policy.value_head.weight[0, 0]) == 2.0
    own = load_actor_critic(configured(tmp_path, "model.critic=separate").model, 1.0, 0, Reader(torch.device("cpu")))
    assert float(own.value_head.weight[0, 0]) == 1.0  # the policy's


def test_a_checkpoint_has_no_revision(hub: Path, tmp_path: Path, tiny_policy: Path) -> None:
    config = configured(tmp_path)
    learner = PPOLearner.load(config.model, config.ppo, config.learner, temperature=1.0, seed=0, num_steps=2)
    learner.save(tmp_path / "checkpoint")
    again = PPOLearner.load(
        config.model,
        config.ppo,
        config.learner,
        temperature=1.0,
        seed=0,
        num_steps=2,
        checkpoint=tmp_path / "checkpoint",
    )
    assert again.policy_version == 0


@pytest.mark.parametrize("option", ["model.revision", "model.reference_revision", "reward.revision"])
def test_a_revision_that_is_not_there_is_said(hub: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=option.replace("_revision", "_path").replace("revision", "path")):
        check(configured(tmp_path, f"{option}={'c3' * 20}"))


def test_a_folder_has_no_revisions(tiny_policy: Path, tiny_classifier: Path, hub: Path, tmp_path: Path) -> None:
    paths = (f"model.path={tiny_policy}", f"reward.path={tiny_classifier}", f"model.reference_path={tiny_policy}")
    config = configured(tmp_path, *paths, "prompts.revision=v1")
    with pytest.raises(InputError) as error:
        check(config)
    assert str(error.value).count("is for a name on a hub") == 4
    with pytest.raises(InputError, match="is for a name on a hub"):
        ModelSizes.read(config)
    with pytest.raises(InputError, match="is for a name on a hub"):
        HFEngine(str(tiny_policy), trust=config.model.trust)


@pytest.mark.parametrize("option", ["model.reference_revision=v1", "model.critic_revision=v1", "reward.revision=v1"])
def test_a_revision_of_nothing_is_refused(option: str) -> None:
    base = ["output_dir=run", "model.path=m", "prompts.path=p", "reward.function=judge:score"]
    with pytest.raises(InputError, match=option.partition("=")[0]):
        load_config(None, [*base, option])


@pytest.mark.slow
def test_vllm_gets_it(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from ppo_ray.rollout.vllm import VLLMEngine

    class Asked(Exception):
        pass

    def ask(**options: object) -> None:
        raise Asked(options)

    monkeypatch.setattr(vllm, "LLM", ask)
    with pytest.raises(WorkerError) as error:
        VLLMEngine("org/policy", trust=configured(tmp_path).model.trust)
    assert isinstance(error.value.__cause__, Asked)
    (options,) = error.value.__cause__.args
    assert (options["model"], options["revision"], options["code_revision"]) == ("org/policy", FIRST, FIRST)
    assert {"revision", "code_revision"} <= vllm.EngineArgs.__dataclass_fields__.keys()
