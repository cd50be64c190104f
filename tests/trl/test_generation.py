from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from ppo_ray.trl import LengthSampler
from ppo_ray.trl.generation import sampling_temperature

FULL = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0, "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "temperature"),
    [({}, 1.0), ({"temperature": 0.7}, 0.7), ({"top_k": None}, 1.0), ({"num_beams": 1}, 1.0)],
)
def test_the_full_softmax_has_a_temperature(changes: dict[str, Any], temperature: float) -> None:
    assert sampling_temperature(GenerationConfig(), FULL | changes) == temperature


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"top_k": 50}, "top_k=50"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": False}, "do_sample=False"),
        ({"min_length": 8}, "min_length=8"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"logits_processor": [object()]}, "logits_processor"),
    ],
)
def test_what_the_learner_cannot_account_for_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="cannot account for") as caught:
        sampling_temperature(GenerationConfig(), FULL | changes)
    assert named in str(caught.value)


def test_transformers_own_defaults_and_the_models_count() -> None:
    without_top_k = {name: value for name, value in FULL.items() if name != "top_k"}
    with pytest.raises(ValueError, match="top_k=50"):  # transformers' default is not the full softmax
        sampling_temperature(GenerationConfig(), without_top_k)
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.2"):
        sampling_temperature(GenerationConfig(repetition_penalty=1.2), FULL)
    assert sampling_temperature(GenerationConfig(temperature=0.5), FULL) == 0.5


def test_the_range_is_half_open() -> None:
    np.random.seed(0)
    sampler = LengthSampler(2, 8)
    assert {sampler() for _ in range(500)} == {2, 3, 4, 5, 6, 7}


def test_a_seeded_script_draws_trls_lengths() -> None:
    np.random.seed(0)
    sampler = LengthSampler(4, 16)
    assert [sampler() for _ in range(8)] == [9, 4, 7, 15, 7, 11, 13, 7]  # drawn by TRL 0.11.3


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="max_value itself is never drawn"):
        LengthSampler(4, 4)
