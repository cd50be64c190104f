"""Every option of TRL 0.11.3, alone and combined, as recorded (`trl_options/`): learner and trainer must agree."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer

from ppo_ray.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

HERE = Path(__file__).parent
RECORD = HERE / "trl_default"
GOLDEN = json.loads((RECORD / "golden.json").read_text())
CASES = sorted(path.stem for path in (HERE / "trl_options").glob("*.json") if not path.stem.endswith("_as_it_is"))
PER_TOKEN = ("logprobs", "ref_logprobs", "values", "kl", "token_rewards", "advantages", "returns")
OURS = {"logprobs": "old_logprobs", "token_rewards": "rewards"}


@cache
def recorded(case: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a case's options and steps; the default's are in the older record."""
    if case == "trl_default":
        return {}, [step | {"kl": None, "num_optimizer_steps": 4} for step in GOLDEN["steps"]]
    record = json.loads((HERE / "trl_options" / f"{case}.json").read_text())
    return record["options"], record["steps"]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Any:
    def make(**options: Any) -> PPOTrainer:
        folder = shutil.copytree(RECORD / "policy", tmp_path / "policy", dirs_exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PPOConfig(**{"batch_size": 16, "mini_batch_size": 16, "learning_rate": 1e-3} | options)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(folder, summary_dropout_prob=0)
        model.v_head.summary.load_state_dict(safetensors.torch.load_file(RECORD / "value_head.safetensors"))
        reference = AutoModelForCausalLMWithValueHead.from_pretrained(RECORD / "reference")
        return PPOTrainer(config, model, reference, AutoTokenizer.from_pretrained(folder))

    return make


def given(step: int) -> tuple[list[torch.Tensor], ...]:
    """Return the queries, responses and scores of a recorded step."""
    record = GOLDEN["steps"][step]
    return tuple([torch.tensor(item) for item in record[name]] for name in ("queries", "responses", "scores"))


def response_logprobs(model: Any, step: int) -> list[np.ndarray]:
    """Compute the responses' log-probabilities by transformers alone."""
    found = []
    for query, response in zip(*given(step)[:2], strict=True):
        with torch.no_grad():
            logits = model.pretrained_model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        found.append(logits.log_softmax(-1)[range(len(response)), response].numpy())
    return found


@pytest.mark.parametrize("case", ["trl_default", *CASES])
def test_every_figure_of_trl(case: str, make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options, steps = recorded(case)
    trainer = make_trainer(**options)
    updates = []
    update = trainer._backend.update
    monkeypatch.setattr(trainer._backend, "update", lambda *args: updates.append(update(*args)) or updates[-1])
    for index, step in enumerate(steps):
        assert trainer.kl_ctl.value == pytest.approx(step["kl_coef_before"], rel=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = trainer.step(*given(index))  # numpy's global generator draws TRL's own permutations
        assert trainer.kl_ctl.value == pytest.approx(step["kl_coef_after"], rel=1e-5)
        for name in PER_TOKEN:
            found = updates[-1].trajectories.column(OURS.get(name, name)).to_pylist()
            for row, wanted in zip(found, step[name] or found, strict=True):
                np.testing.assert_allclose(
                    row, wanted, atol=2e-4 if index else 1e-5, rtol=1e-5, err_msg=f"{name} {index}"
                )
        for name, value in step["stats"].items():
            assert stats[name] == pytest.approx(value, abs=2e-4, rel=2e-4), (index, name)
        assert updates[-1].metrics["policy/optimizer_steps"] == step["num_optimizer_steps"]
        for row, wanted in zip(response_logprobs(trainer.model, index), step["new_logprobs"], strict=True):
            np.testing.assert_allclose(row, wanted, atol=2e-4, err_msg=f"after step {index}")


def test_clipping_is_mended(make_trainer: Any) -> None:
    """TRL clips its first optimizer step only: the iterator over its parameters is exhausted by then."""
    mended, as_it_is = (recorded(name)[1] for name in ("max_grad_norm", "max_grad_norm_as_it_is"))
    distance = [np.abs(np.concatenate(step["new_logprobs"])).sum() for step in (mended[0], as_it_is[0])]
    assert abs(distance[0] - distance[1]) > 1


def test_every_option_has_its_record() -> None:
    """Each option of TRL's that changes an update is recorded with another value than its default."""
    covered = {name for case in CASES for name in recorded(case)[0]}
    not_of_the_update = {"batch_size", "learning_rate"}  # both differ from TRL's default in every record
    options = {
        *("adap_kl_ctrl", "init_kl_coef", "kl_penalty", "target", "horizon", "gamma", "lam", "cliprange"),
        *("cliprange_value", "vf_coef", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"),
        *("max_grad_norm", "early_stopping", "target_kl", "ratio_threshold", "use_score_scaling", "use_score_norm"),
        *("score_clip", "whiten_rewards"),
    }
    assert covered == options - not_of_the_update
