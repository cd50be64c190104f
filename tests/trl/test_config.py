import dataclasses

import numpy as np
import pytest
from transformers import HfArgumentParser

from ppo_ray.trl import PPOConfig

DEFAULTS = {  # TRL 0.11.3, trainer/ppo_config.py, in its order
    "seed": 0,
    "log_with": None,
    "task_name": None,
    "model_name": "gpt2",
    "query_dataset": "stanfordnlp/imdb",
    "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    "remove_unused_columns": True,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "push_to_hub_if_best_kwargs": {},
    "steps": 20000,
    "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True,
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "target": 6.0,
    "horizon": 10000.0,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "batch_size": 128,
    "forward_batch_size": None,
    "mini_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "world_size": None,
    "ppo_epochs": 4,
    "max_grad_norm": None,
    "optimize_cuda_cache": None,
    "optimize_device_cache": False,
    "early_stopping": False,
    "target_kl": 1.0,
    "compare_steps": 1,
    "ratio_threshold": 10.0,
    "use_score_scaling": False,
    "use_score_norm": False,
    "score_clip": None,
    "whiten_rewards": False,
    "gradient_checkpointing": False,
    "is_encoder_decoder": None,
    "is_peft_model": None,
    "global_backward_batch_size": None,
    "global_batch_size": None,
    "dataset_num_proc": None,
}


def test_fields_and_defaults_are_trls() -> None:
    config = PPOConfig()
    names = [field.name for field in dataclasses.fields(PPOConfig)]
    assert [name for name in names if name not in ("exp_name", "backward_batch_size")] == list(DEFAULTS)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_derived_figures() -> None:
    config = PPOConfig(batch_size=64, mini_batch_size=8, gradient_accumulation_steps=4, steps=100)
    assert (config.backward_batch_size, config.total_ppo_epochs) == (32, 2)
    with pytest.warns(FutureWarning, match="forward_batch_size"):
        assert PPOConfig(batch_size=64, forward_batch_size=16).mini_batch_size == 16
    assert PPOConfig(tracker_kwargs={"wandb": {"entity": "me"}}).to_dict()["tracker_kwargs/wandb/entity"] == "me"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "mini_batch_size": 4}, "batch_size=10 is not a multiple of mini_batch_size=4"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"kl_penalty": "k3"}, "kl_penalty='k3' is not one of kl, mse, abs, full"),
        ({"log_with": "mlflow"}, "log_with='mlflow' is not one of wandb, tensorboard"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True cannot be honoured"),
        ({"push_to_hub_if_best_kwargs": {"repo_id": "x"}}, "cannot be honoured"),
        ({"is_peft_model": True}, "adapters are made by from_pretrained"),
        ({"world_size": 2}, "ppo-ray train"),
        ({"optimize_cuda_cache": True, "optimize_device_cache": True}, "give one of them"),
        ({"gamma": 1.5}, "gamma"),
    ],
)
def test_what_cannot_be_honoured_raises(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_the_learner_is_told_to_compute_what_trl_computes() -> None:
    ours = PPOConfig(
        batch_size=64, mini_batch_size=8, gradient_accumulation_steps=4, kl_penalty="mse", early_stopping=True
    ).to_ppo_ray()
    assert (ours.minibatch_size, ours.gradient_accumulation, ours.loss_aggregation) == (32, 4, "microbatch_mean")
    assert (ours.kl_estimator, ours.early_stopping, ours.ratio_exceeded) == ("k2", "after_epoch", "zero_loss")
    assert PPOConfig(use_score_norm=True).to_ppo_ray().score_scaling == "none"  # as in TRL: only with use_score_scaling


def test_the_derived_field_stands_where_trl_has_it() -> None:
    names = [field.name for field in dataclasses.fields(PPOConfig)]
    assert names[0] == "exp_name"
    assert names[names.index("is_peft_model") + 1] == "backward_batch_size"
    assert len(names) == 49


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 8.0}, "batch_size=8.0 must be at least 1, a whole number"),
        ({"mini_batch_size": True}, "mini_batch_size=True must be"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"lam": 1.5}, "lam=1.5 must be from 0 to 1"),
        ({"init_kl_coef": None}, "init_kl_coef=None must be at least 0"),
        ({"score_clip": 0}, "score_clip=0 must be above 0, or None"),
        ({"cliprange_value": -0.2, "target": 0.0}, "target=0.0 must be above 0\ncliprange_value=-0.2 must be above 0"),
    ],
)
def test_values_out_of_bounds_are_named_as_trl_names_them(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PPOConfig(**options)
    assert message in str(caught.value)


def test_numpys_numbers_are_numbers() -> None:
    ours = PPOConfig(batch_size=np.int64(8), mini_batch_size=np.int64(4), cliprange=np.float32(0.5)).to_ppo_ray()
    assert (ours.minibatch_size, ours.clip_range) == (4, 0.5)


def test_the_old_name_of_the_device_cache_counts() -> None:
    with pytest.warns(FutureWarning, match="use optimize_device_cache"):
        assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache is True  # TRL's own took no notice of it


def test_wandb_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_ray.trl.config.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        PPOConfig(log_with="wandb")


def test_transformers_argument_parser_takes_it() -> None:
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--batch_size", "64", "--mini_batch_size", "8", "--kl_penalty", "mse", "--score_clip", "2.5"]
    )
    assert (config.batch_size, config.backward_batch_size, config.kl_penalty, config.score_clip) == (64, 8, "mse", 2.5)
