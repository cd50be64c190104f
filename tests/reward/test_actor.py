"""What a reward worker adds to trajectories, and what it says of those without a score; without Ray around it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ppo_ray import trajectory
from ppo_ray.config import load_config
from ppo_ray.learner.batch import ResponseBatch, summarize_table
from ppo_ray.reward.actor import RewardWorker
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
