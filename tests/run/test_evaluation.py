"""Figures of an evaluation: by hand, against all draws of k answers, and against the table they are made of."""

from itertools import combinations
from statistics import fmean

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.config import EvaluationConfig
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.run.evaluation import pass_rate, repeat_prompts, standard_error, summarize_evaluation


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=4), st.integers(1, 8))
def test_pass_rate_is_the_mean_over_all_draws_of_k_answers(passes: list[list[bool]], k: int) -> None:
    rates = [fmean(map(any, combinations(answers, k))) for answers in passes if len(answers) >= k]
    assert pass_rate(passes, k) == (pytest.approx(fmean(rates)) if rates else None)


def test_pass_rate_by_hand() -> None:
    assert pass_rate([[True, False, False, False]], 2) == pytest.approx(0.5)  # 1 - C(3, 2) / C(4, 2)
    assert pass_rate([[True] * 10 + [False] * 190], 10) == pytest.approx(0.408548, abs=1e-6)


def test_prompts_are_repeated_under_ids_of_their_own() -> None:
    held_out = PromptBatch((-1, -3), ((5,), (6, 7)), columns=pa.table({"messages": ["a", "b"]}))
    batch = repeat_prompts(held_out, 3, 2)
    assert (batch.sample_ids, batch.prompt_ids) == ((-1, -3, -4, -6), ((5,), (6, 7)) * 2)
    assert batch.columns is not None and batch.columns.column("messages").to_pylist() == ["a", "b"] * 2
    assert repeat_prompts(held_out, 3, 1).sample_ids == (-1, -3)


def test_figures_by_hand() -> None:
    table = pa.table(
        {
            "sample_id": [-1, -2, -4, -5, -7, -8, -10, -11],  # prompts 0 and 1, four answers each
            "score": [1.0, 0.0, None, 3.0, 1.0, 0.0, 2.0, 0.0],
            "finish_reason": ["stop", "length"] * 4,
            "parts": [{"exact": value} for value in (0, 0, 0, 1, 0, 0, None, 0)],
            "num_tokens": [2, 4] * 4,
        }
    )
    options = EvaluationConfig(num_prompts=3, num_samples=1, samples_per_prompt=4, pass_score=1.0)
    figures = dict(summarize_evaluation(table, options, 3))
    assert figures == {
        "eval/score_mean": 1.0,
        "eval/score_error": pytest.approx((4 / 3 - 3 / 4) / 2),  # means of two prompts
        "eval/unscored": 0.125,
        "eval/tokens_mean": 3.0,
        "eval/eos_rate": 0.5,
        "eval/exact_mean": pytest.approx(1 / 7),
        "eval/pass@1": pytest.approx((1 + 1 / 4) / 2),
        "eval/pass@2": pytest.approx((1 + 1 / 2) / 2),
        "eval/pass@4": 1.0,  # of the one prompt that has four scored answers
    }
    by_part = EvaluationConfig(num_prompts=3, num_samples=1, pass_score=1.0, pass_part="exact")
    assert dict(summarize_evaluation(table, by_part, 3))["eval/pass@1"] == pytest.approx((0 + 1 / 4) / 2)
    silent = EvaluationConfig(num_prompts=3, num_samples=1)
    assert not any("pass" in name for name in dict(summarize_evaluation(table, silent, 3)))


def test_the_standard_error_is_that_of_the_prompts_means() -> None:
    table = pa.table({"sample_id": [-1, -2, -3, -4, -5], "score": [1.0, 2.0, None, 3.0, 2.0]})
    # both prompts have a mean of 2
    assert standard_error(table, 3) == 0.0
    table = pa.table({"sample_id": [-1, -2, -3, -4], "score": [1.0, 4.0, 7.0, 1.0]})
    assert standard_error(table, 3) == pytest.approx(3 / 3**0.5)
    assert standard_error(table.slice(3), 3) is None
