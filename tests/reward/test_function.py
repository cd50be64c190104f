import asyncio
import math
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_ray.errors import InputError
from ppo_ray.reward.function import RewardFunction, load_function


def by_length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(prompt) * 10 + len(response)) for prompt, response in zip(prompts, responses, strict=True)]


def dislikes_bad(prompts: list[str], responses: list[str]) -> list[float | None]:
    if any("bad" in response for response in responses):
        raise RuntimeError("bad text")
    return [0.0 for _ in responses]


def odd(prompts: list[str], responses: list[str]) -> list[object]:
    return {"short": [1.0], "text": ["x"] * len(responses), "nan": [math.nan] * len(responses)}[prompts[0]]


LEAVING = {"exit": SystemExit(3), "interrupt": KeyboardInterrupt()}


def leaves(prompts: list[str], responses: list[str]) -> list[float]:
    for response in responses:
        if response in LEAVING:
            raise LEAVING[response]
    return [1.0] * len(responses)


def shaped(prompts: list[str], responses: list[str]) -> object:
    scores = np.arange(len(responses), dtype=np.float32)
    made = {
        "array": scores,
        "tensor": torch.from_numpy(scores),
        "bools": [True] * len(responses),
        "matrix": scores[:, None].repeat(2, 1),
        "generator": (float(score) for score in scores),
        "numbers in quotes": ["1.0"] * len(responses),
        "nothing": None,
        "one bool": True,
        "a scalar array": scores.sum(),
        "a scalar tensor": torch.zeros(()),
        "a string": "1" * len(responses),
        "bytes": b"1" * len(responses),
        "a dict": dict(enumerate(responses)),
        "a set": set(range(len(responses))),
        "a column": torch.zeros(len(responses), 1),
        "lists": [[1.0]] * len(responses),
        "infinite": [math.inf] * len(responses),
        "tensor with nan": torch.tensor([math.nan] * len(responses)),
        "beyond floats": [10**400] * len(responses),
    }
    return made[prompts[0]]


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


def test_a_function_that_raises_on_all_texts_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    function = RewardFunction(name(dislikes_bad))
    for _ in range(2):  # each batch has its own count
        caplog.clear()
        assert function.score(["p"] * 1000, ["bad" + "x" * 500] * 1000) == [None] * 1000
        assert len(caplog.records) == 5  # the batch, three pairs, how many more
        assert caplog.records[-1].getMessage().endswith("raised on 997 more responses of this batch")
        assert len(caplog.text) < 10_000 and "x" * 100 not in caplog.text
    caplog.clear()
    function.score(["p"] * 3, ["bad", "good", "bad"])
    assert len(caplog.records) == 3 and "more" not in caplog.text


def test_the_first_reason_of_a_missing_score_is_kept_until_the_next_batch() -> None:
    function = RewardFunction(name(dislikes_bad))
    function.score(["why?"] * 3, ["good", "a bad one", "bad too"])
    assert function.failure is not None and function.failure.endswith(
        "dislikes_bad': the prompt 'why?' with the response 'a bad one' has no score: it raised RuntimeError: bad text"
    )
    assert function.score(["p"], ["good"]) == [0.0] and function.failure is None
    function = RewardFunction(name(odd))
    function.score(["nan"], ["a"])
    assert function.failure is not None and "it returned None or no finite number" in function.failure


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


def test_the_current_folder_has_what_no_other_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])  # as a console script has it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_of_this_folder.py").write_text("def score(prompts, responses): return [7.0]")
    (tmp_path / "colorsys.py").write_text("raise AssertionError('not the one that was meant')")
    assert load_function("reward_of_this_folder:score")([], []) == [7.0]
    assert load_function("colorsys:rgb_to_hls")(1.0, 1.0, 1.0) == (0.0, 1.0, 0.0)


def test_a_module_that_is_a_script_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_script_reward.py").write_text("import sys\nsys.exit(2)")
    with pytest.raises(InputError, match=r"importing my_script_reward ended in sys\.exit\(2\)"):
        load_function("my_script_reward:score")


@pytest.mark.parametrize("how", LEAVING)
def test_a_function_that_leaves_does_not_take_the_worker_along(how: str) -> None:
    assert RewardFunction(name(leaves)).score(["p", "p"], ["good", how]) == [1.0, None]


@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        *(("array", [0.0, 1.0]), ("tensor", [0.0, 1.0]), ("bools", [1.0, 1.0]), ("infinite", [None, None])),
        *(("tensor with nan", [None, None]), ("beyond floats", [None, None])),
    ],
)
def test_what_counts_as_scores(kind: str, scores: list[float | None]) -> None:
    assert RewardFunction(name(shaped)).score([kind, kind], ["a", "b"]) == scores


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("matrix", r"an array of shape \(2, 2\) for 2 texts; it must return a list"),
        ("a column", r"an array of shape \(2, 1\)"),
        ("a scalar array", r"an array of shape \(\)"),
        ("a scalar tensor", r"an array of shape \(\)"),
        ("generator", "a generator for 2 texts"),
        ("nothing", "None for 2 texts"),
        ("one bool", "a bool for 2 texts"),
        ("a string", "a str for"),
        ("bytes", "a bytes for"),
        ("a dict", "a dict for"),
        ("a set", "a set for"),
        ("numbers in quotes", "'1.0', which is neither a number nor None"),
        ("lists", r"\[1.0\], which is neither a number nor None"),
    ],
)
def test_what_does_not(kind: str, message: str) -> None:
    with pytest.raises(InputError, match=f"reward.function='.*:shaped' returned {message}"):
        RewardFunction(name(shaped)).score([kind, kind], ["a", "b"])


def by_answer(answer: list[int], responses: list[str]) -> list[float]:
    return [float(str(right) in response) for right, response in zip(answer, responses, strict=True)]


def takes_all(responses: list[str], **columns: list[object]) -> list[float]:
    return [float(len(columns)) for _ in responses]


def with_default(responses: list[str], scale: float = 2.0) -> list[float]:
    return [scale for _ in responses]


def other_names(questions: list[str], replies: list[str]) -> list[float]:
    return [float(len(question) - len(reply)) for question, reply in zip(questions, replies, strict=True)]


def misspelt(responses: list[str], anwser: list[int]) -> list[float]:
    return [0.0 for _ in responses]


def three(a: list[str], b: list[str], c: list[str]) -> list[float]:
    return [0.0 for _ in a]


def test_a_function_gets_what_its_parameters_name() -> None:
    columns = {"answer": [4, 5], "source": ["a", "b"]}
    assert find("by_answer", columns).score(["", ""], ["it is 4", "it is 4"], columns) == [1.0, 0.0]
    everything = columns | {name: [[], []] for name in ("messages", "response_ids", "finish_reasons")}
    assert find("takes_all", columns).score(["", ""], ["x", "y"], everything) == [6.0, 6.0]
    assert find("with_default").score([""], ["x"]) == [2.0]
    assert find("other_names").score(["abc"], ["x"]) == [2.0]


@pytest.mark.parametrize(("name", "unknown"), [("misspelt", "anwser"), ("three", "a, b, c"), ("by_answer", "answer")])
def test_parameters_that_nothing_is_known_for_are_refused(name: str, unknown: str) -> None:
    with pytest.raises(InputError, match=f"nothing is known for its parameters {unknown}; there are prompts, resp"):
        find(name)


def find(name: str, columns: Collection[str] = (), **limits: float) -> RewardFunction:
    return RewardFunction(f"{__name__}:{name}", columns, **limits)


RUNNING: list[int] = []


async def waits(response: str, answer: int) -> float | None:
    RUNNING.append(RUNNING[-1] + 1 if RUNNING else 1)
    await asyncio.sleep({"late": 60.0}.get(response, 0.01))
    RUNNING.append(RUNNING[-1] - 1)
    if response == "bad":
        raise RuntimeError("no answer")
    return None if response == "none" else float(answer)


def test_coroutines_run_at_one_time_up_to_the_limit() -> None:
    RUNNING.clear()
    function = find("waits", ["answer"], max_concurrent=8, timeout_s=30)
    assert function.score([""] * 64, ["x"] * 64, {"answer": range(64)}) == [float(n) for n in range(64)]
    assert max(RUNNING) == 8


def test_a_coroutine_that_fails_or_is_late_costs_its_own_score_alone() -> None:
    function = find("waits", ["answer"], timeout_s=0.5)
    responses = ["x", "late", "bad", "none", "x"]
    assert function.score(["p"] * 5, responses, {"answer": range(5)}) == [0.0, None, None, None, 4.0]
    assert function.failure is not None and "it raised RuntimeError: no answer" in function.failure
    assert function.score(["p"], ["late"], {"answer": [1]}) == [None]
    assert function.failure is not None and "it took more than 0.5 s (reward.timeout_s)" in function.failure
