"""What a reward worker adds to trajectories, and what it says of those without a score; without Ray around it."""

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from ppo_ray import trajectory
from ppo_ray.config import load_config
from ppo_ray.errors import InputError
from ppo_ray.learner.batch import ResponseBatch
from ppo_ray.learner.metrics import summarize_table
from ppo_ray.reward.actor import Clock, RewardWorker
from ppo_ray.reward.group import RewardGroup
from tests.test_trajectory import row


def make_worker(classifier: Path) -> Any:
    worker = RewardWorker.__ray_metadata__.modified_class("reward-0")
    worker.setup(load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", f"reward.path={classifier}"]))
    return worker


def test_texts_that_were_cut_are_marked_and_counted(tiny_classifier: Path) -> None:
    rows = [row(0), row(1, prompt="a wonderful story " * 200), row(2, prompt="", response=""), row(3)]
    scored, _ = make_worker(tiny_classifier).score(trajectory.from_rows(rows))
    assert scored.column("truncated").to_pylist() == [False, True, False, False]
    metrics = summarize_table(scored, ResponseBatch.from_table(scored))
    assert metrics["score/truncated_rate"] == 0.25 and metrics["score/num_unscored"] == 1


def score_length(responses: list[str], answer: list[int]) -> list[float | None]:
    return [None if right < 0 else float(len(text) + right) for text, right in zip(responses, answer, strict=True)]


def score_finish(finish_reasons: list[str], response_ids: list[list[int]], messages: list[Any]) -> list[float | None]:
    return [
        None if chat[0]["content"] == "none" else float(reason == "stop") + len(ids)
        for reason, ids, chat in zip(finish_reasons, response_ids, messages, strict=True)
    ]


def test_parts_are_weighed_recorded_and_left_out_where_they_have_no_score(tiny_classifier: Path) -> None:
    parts = [
        {"name": "length", "function": f"{__name__}:score_length", "weight": 0.5},
        {"name": "finish", "function": f"{__name__}:score_finish", "weight": -2},
        {"name": "taste", "path": str(tiny_classifier), "transform": "softmax", "dtype": "bfloat16"},
    ]
    worker = RewardWorker.__ray_metadata__.modified_class("reward-0")
    options = ["output_dir=x", "model.path=m", "prompts.path=p", "prompts.keep=[meta.answer]", f"reward.parts={parts}"]
    worker.setup(load_config(None, options))
    chats = [json.dumps([{"role": "user", "content": word}]) for word in ("a", "none", "none", "b")]
    answers = pa.StructArray.from_arrays([pa.array([1, -1, -1, 2])], names=["answer"])
    rows = [row(0), row(1), row(2, prompt="", response=""), row(3)]
    table = trajectory.from_rows(rows, pa.table({"messages": chats, "row": answers}))
    scored, _ = worker.score(table)
    trajectory.validate(scored)
    found, scores = scored.column("parts").to_pylist(), scored.column("score").to_pylist()
    assert [part["length"] for part in found] == [len(row(0)["response"]) + 1, None, None, len(row(3)["response"]) + 2]
    assert found[1]["finish"] is None and found[2] == {"length": None, "finish": None, "taste": None}
    for part, score in zip(found, scores, strict=True):
        terms = [w * part[n] for n, w in (("length", 0.5), ("finish", -2), ("taste", 1)) if part[n] is not None]
        assert score == (pytest.approx(sum(terms), abs=1e-6) if terms else None)
    metrics = summarize_table(scored, ResponseBatch.from_table(scored))
    lengths = [part["length"] for part in found if part["length"] is not None]
    assert metrics["parts/length_mean"] == pytest.approx(sum(lengths) / 2)
    assert metrics["parts/length_unscored"] == 0.5 and metrics["parts/taste_unscored"] == 0.25
    assert metrics["parts/taste_std"] >= 0 and metrics["score/num_unscored"] == 1


def score_as_asked(responses: list[str]) -> Any:
    return {"none": [None], "text": ["1.0"]}[responses[0]]


@pytest.mark.parametrize("key", ["reward", "reward.parts[1]"])
def test_what_goes_wrong_names_the_function_by_its_key(key: str) -> None:
    function = f"{__name__}:score_as_asked"
    parts = [{"name": name, "function": f"{__name__}:{name}"} for name in ("by_size", "score_as_asked")]
    reward = f"reward.function={function}" if key == "reward" else f"reward.parts={parts}"
    worker = RewardWorker.__ray_metadata__.modified_class("reward-0")
    worker.setup(load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", reward]))
    worker.score(trajectory.from_rows([row(0, response="none")]))
    assert worker.explain().startswith(f"{key}.function={function!r}: the prompt ")
    with pytest.raises(InputError, match=re.escape(f"{key}.function={function!r} returned '1.0'")):
        worker.score(trajectory.from_rows([row(0, response="text")]))


def by_size(responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_what_was_not_cut_by_a_classifier_counts_as_whole() -> None:
    table = trajectory.with_scores(trajectory.from_rows([row(0), row(1)]), [1.0, 2.0])
    assert summarize_table(table, ResponseBatch.from_table(table))["score/truncated_rate"] == 0.0


def test_a_worker_tells_why_the_last_text_that_it_could_not_score_has_no_score(tiny_classifier: Path) -> None:
    worker = make_worker(tiny_classifier)
    worker.score(trajectory.from_rows([row(0)]))
    assert worker.explain() is None
    worker.score(trajectory.from_rows([row(0), row(1, prompt="", response="")]))
    worker.score(trajectory.from_rows([row(2)]))
    assert worker.explain() == "the text '' has no score: it is empty"


def test_the_group_names_the_worker_whose_words_they_are() -> None:
    group: Any = RewardGroup.__new__(RewardGroup)
    members = [SimpleNamespace(name="reward-0"), SimpleNamespace(name="reward-1")]
    group._group = SimpleNamespace(
        members=members, call=lambda doing, call: [None, "the text 'x' has no score: it is x"]
    )
    assert group.explain() == "reward-1: the text 'x' has no score: it is x"
    group._group.call = lambda doing, call: [None, None]
    assert group.explain() == "see the reward worker's log"


ARRIVED: dict[str, threading.Event] = {}


async def score_when_another_has(response: str, prompt: str) -> float:
    """Return once a response of the other kind has come here: alone, or one behind the other, none ever does."""
    ARRIVED[response].set()
    other = ARRIVED[{"quick": "slow", "slow": "quick"}[response]]
    if not await asyncio.to_thread(other.wait, 60):
        raise TimeoutError(f"{response} waited in vain")
    return float(len(response))


async def exit_at_once(response: str) -> float:
    raise SystemExit(response)


def test_shards_and_parts_that_wait_do_not_wait_for_one_another() -> None:
    parts = [
        {"name": "first", "function": f"{__name__}:score_when_another_has"},
        {"name": "exits", "function": f"{__name__}:exit_at_once"},
    ]
    worker = RewardWorker.__ray_metadata__.modified_class("reward-0")
    worker.setup(load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", f"reward.parts={parts}"]))
    ARRIVED.update(slow=threading.Event(), quick=threading.Event())
    tables = [trajectory.from_rows([row(n, response=word)]) for n, word in enumerate(("slow", "quick"))]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(worker.score, tables))
    assert [table.column("score").to_pylist() for table, _ in answers] == [[4.0], [5.0]]
    assert f"{__name__}:exit_at_once" in worker.explain() and "it raised SystemExit: " in worker.explain()


async def score_when_a_file_is_there(prompt: str, response: str) -> float:
    """Leave a file named after the response in the folder that the prompt names; return once both files are there."""
    Path(prompt, response).touch()
    async with asyncio.timeout(100):
        while not all(Path(prompt, name).exists() for name in ("slow", "quick")):
            await asyncio.sleep(0.05)
    return float(len(response))


@pytest.mark.slow
def test_a_worker_scores_its_shards_at_once(session: None, tmp_path: Path) -> None:
    options = [
        f"reward.function={__name__}:score_when_a_file_is_there",
        "reward.timeout_s=120",
        "ray.call_timeout_s=300",
    ]
    config = load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", *options])
    group = RewardGroup(config, print)
    try:
        group.setup()
        rows = [[row(n, prompt=str(tmp_path), response=word)] for n, word in enumerate(("slow", "quick"))]
        source: Any = SimpleNamespace(tables=[ray.put(trajectory.from_rows(one)) for one in rows], wait=lambda stop: {})
        shards = group.score(source)
        assert shards.wait()["time/score_s"] > 0
        assert shards.fetch().column("score").to_pylist() == [4.0, 5.0]
    finally:
        group.close()


def test_seconds_of_calls_that_overlap_add_up_to_the_time_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 14.0, 15.0, 20.0, 21.0])  # of: a begins; b ends; a ends; c begins; c ends
    monkeypatch.setattr("ppo_ray.reward.actor.time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = Clock()
    clock.begin()
    clock.begin()
    assert (clock.end(), clock.end()) == (4.0, 1.0)
    clock.begin()
    assert clock.end() == 1.0
