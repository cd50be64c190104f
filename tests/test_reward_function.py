import math

import pytest

from ppo_ray.errors import InputError
from ppo_ray.reward_function import RewardFunction, load_function


def by_length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(prompt) * 10 + len(response)) for prompt, response in zip(prompts, responses, strict=True)]


def dislikes_bad(prompts: list[str], responses: list[str]) -> list[float | None]:
    if any("bad" in response for response in responses):
        raise RuntimeError("bad text")
    return [0.0 for _ in responses]


def odd(prompts: list[str], responses: list[str]) -> list[object]:
    return {"short": [1.0], "text": ["x"] * len(responses), "nan": [math.nan] * len(responses)}[prompts[0]]


def name(function: object) -> str:
    return f"{__name__}:{function.__name__}"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or __import__("types").SimpleNamespace(**globals())
    )


def test_scores_pairs() -> None:
    assert RewardFunction(name(by_length)).score(["ab", "c"], ["xyz", ""]) == [23.0, 10.0]


def test_one_bad_text_costs_no_other_its_score() -> None:
    assert RewardFunction(name(dislikes_bad)).score(["p"] * 3, ["good", "bad", "fine"]) == [0.0, None, 0.0]


def test_what_is_not_a_number_a_text() -> None:
    function = RewardFunction(name(odd))
    with pytest.raises(InputError, match="returned 1 scores for 2 texts"):
        function.score(["short", "p"], ["a", "b"])
    with pytest.raises(InputError, match="neither a number nor None"):
        function.score(["text"], ["a"])
    assert function.score(["nan"], ["a"]) == [None]


@pytest.mark.parametrize("bad", ["nocolon", "no.such.module:f", "math:no_such", "math:pi"])
def test_bad_names(bad: str) -> None:
    with pytest.raises(InputError, match="reward.function"):
        load_function(bad)
