"""A judge: what it is asked, what is read in its answers, and what it says itself on each engine."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.config import Config, JudgeConfig, load_config
from ppo_ray.errors import InputError
from ppo_ray.reward.judge import Judge, Question
from ppo_ray.reward.scorer import Scorer
from ppo_ray.rollout.judge import judge_environment, start_judge

ANSWERS = ["Verdict: 3", "Verdict: 1 ... Verdict: 9.5", "I cannot say", "Verdict: yes", "Verdict: inf"]


class Letters:
    """A tokenizer whose ids are the letters."""

    chat_template: str | None = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> dict[str, list[int]]:
        assert options["add_generation_prompt"] and [message["role"] for message in messages] == ["user"]
        return self(f"<{messages[0]['content']}>")

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(map(chr, ids))


class Answers:
    """A judge that says what it is to say, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, questions: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        self.asked = ["".join(map(chr, ids)) for ids in questions]
        return [tuple(map(ord, answer)) for answer in ANSWERS[: len(questions)]]


@pytest.fixture
def question(tmp_path: Path) -> str:
    path = tmp_path / "question.txt"
    path.write_text("Asked {prompt}, said {response}, right is {answer}. {{}}")
    return str(path)


def judging(question: str, **options: Any) -> JudgeConfig:
    return JudgeConfig(**{"path": "m", "prompt": question, "pattern": r"Verdict: ([\w.]+)", **options})


def test_the_last_verdict_counts_and_what_has_none_has_no_score(question: str) -> None:
    ask = Answers()
    judge = Judge(judging(question), ["answer"], Letters(), ask)
    assert judge.arguments == ("answer",)
    columns = {"answer": [1, "two", [3], None, {"a": 5}]}
    assert judge.score(["p"] * 5, list("abcde"), columns) == [3, 9.5, None, None, None]
    assert judge.failure == "the response 'c' has no score: there is no verdict in the judge's answer 'I cannot say'"
    rights = ["1", "two", "[3]", "null", '{"a": 5}']
    assert ask.asked == [f"Asked p, said {r}, right is {a}. {{}}" for r, a in zip("abcde", rights, strict=True)]
    words = Judge(judging(question, scores={"3": 0.25, "yes": 1}), ["answer"], Letters(), ask)
    assert words.score(["p"] * 5, list("abcde"), columns) == [0.25, None, None, 1, None]


def test_conversations_stand_for_the_prompt_and_the_judges_own_template_is_used(question: str) -> None:
    ask, tokenizer = Answers(), Letters()
    tokenizer.chat_template = "..."
    judge = Judge(judging(question), ["answer"], tokenizer, ask)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{response}?"}]
    assert judge.score(["ignored"], ["{answer}"], {"answer": ["x"], "messages": [chat]}) == [3]
    assert ask.asked == ["<Asked system: Be brief.\nuser: {response}?, said {answer}, right is x. {}>"]


def test_a_question_that_is_too_long_is_not_asked(question: str) -> None:
    ask = Answers()
    judge = Judge(judging(question, max_context=50, max_tokens=10), ["answer"], Letters(), ask)
    assert judge.score(["p", "p"], ["a" * 90, "b"], {"answer": [1, 2]}) == [None, 3]
    assert len(ask.asked) == 1 and judge.failure is not None
    assert judge.failure.endswith("its question has 120 tokens, and max_context - max_tokens = 40")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{respnse}", "nothing is known for {respnse}; there are prompt, response, answer"),
        ("{response} {answer.__class__}", "nothing is known for {answer.__class__}"),
        ("{response} {", "write {{ and }} for braces"),
        ("{response!r}", "a name in braces stands alone"),
        ("{prompt}", "does not hold {response}"),
    ],
)
def test_a_question_that_cannot_be_filled_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "q.txt").write_text(text)
    with pytest.raises(InputError) as caught:
        Question(str(tmp_path / "q.txt"), ["answer"])
    assert words in str(caught.value)
    with pytest.raises(InputError, match=r"prompt=/no.txt: cannot be read"):
        Question("/no.txt", [])


def ask_real_model(config: Config) -> tuple[list[str], list[float | None]]:
    """Ask a config's judge two questions; returns what it answered, and the scores."""
    os.environ.update(judge_environment(config))
    scorer = Scorer(config, start_judge)
    judge: Any = scorer._scorers[0]
    answers: list[str] = []
    judge._read = lambda text: answers.append(text) or float(len(text))
    columns = {"answer": ["a film", "a story"]}
    (scores,) = scorer.score(["good", "bad"], ["so good", "so bad"], lambda names: columns).parts
    return answers, scores


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_a_real_model_answers_greedily(engine: str, tiny_policy: Path, question: str) -> None:
    """In a process of its own: what vLLM sets up in one is shared by all engines there."""
    options = f"{{path: {tiny_policy}, prompt: {question}, pattern: '(.+)', engine: {engine}, max_tokens: 5, "
    options += "max_context: 200, kv_cache_mib: 32}"
    base = ["output_dir=x", f"model.path={tiny_policy}", "prompts.path=p", "prompts.keep=[answer]"]
    config = load_config(None, [*base, f"reward.judge={options}"])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        answers, scores = pool.submit(ask_real_model, config).result(timeout=300)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_policy).eval(),
        AutoTokenizer.from_pretrained(tiny_policy),
    )
    wanted = []
    for prompt, response, answer in zip(["good", "bad"], ["so good", "so bad"], ["a film", "a story"], strict=True):
        ids = tokenizer(f"Asked {prompt}, said {response}, right is {answer}. {{}}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=0, pad_token_id=0)
        wanted.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers == wanted and scores == [float(len(text)) for text in wanted]
