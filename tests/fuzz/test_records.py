"""Hostile or damaged files of a run's folder: the right value, or one clear error, in bounded time."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ppo_ray.algo.rewards import RunningMoments
from ppo_ray.checkpoint import LEARNER_FOLDER, RunState, verify
from ppo_ray.config import load_config, load_evaluation_config
from ppo_ray.errors import PPORayError
from ppo_ray.learner.state import LearnerState
from ppo_ray.run.evaluation import Evaluation, Sample
from ppo_ray.run.log import has_steps, read_steps
from tests.fuzz.mutations import damaged, json_values, mutated

LONGEST_MESSAGE = 3_000  # characters: an error quotes its input, and must not repeat all of it


def outcome(read, *arguments: Any) -> Any:
    """Return what a reader returns, or its error if that is one of ours and of a readable length."""
    try:
        return read(*arguments)
    except PPORayError as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE
        return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records")
    (path / LEARNER_FOLDER).mkdir()
    return path


STATE = {"step": 3, "prompt_position": 24, "prompts_fingerprint": "f00"}
LEARNER = {
    "policy_version": 3,
    "kl_coef": 0.2,
    "moments": {"count": 24, "mean": 0.5, "var": 2.0},
    "weights_checksum": "a" * 16,
    "reference_checksum": "b" * 16,
}
EVALUATION = {
    "mean_score": 0.5,
    "std_score": 1.0,
    "num_prompts": 1,
    "num_unscored": 0,
    "samples": [{"prompt": "a", "response": "b", "score": 0.5}],
}


def test_the_records_are_those_that_are_written(folder: Path) -> None:
    """Else the tests below would mutate something that is refused anyway."""
    for name, record in (("run.json", STATE), (f"{LEARNER_FOLDER}/state.json", LEARNER), ("e.json", EVALUATION)):
        (folder / name).write_text(json.dumps(record))
    assert RunState.read(folder) == RunState(3, 24, "f00")
    assert LearnerState.read(folder).moments == RunningMoments(**LEARNER["moments"])
    assert Evaluation.read(folder / "e.json").samples == (Sample("a", "b", 0.5),)


@given(content=st.one_of(mutated(STATE), damaged(json.dumps(STATE).encode())))
def test_a_runs_state(folder: Path, content: bytes) -> None:
    (folder / "run.json").write_bytes(content)
    found = outcome(RunState.read, folder)
    if isinstance(found, RunState):
        assert (type(found.step), type(found.prompt_position), type(found.prompts_fingerprint)) == (int, int, str)


@given(content=st.one_of(mutated(LEARNER), damaged(json.dumps(LEARNER).encode())))
def test_a_learners_state(folder: Path, content: bytes) -> None:
    (folder / LEARNER_FOLDER / "state.json").write_bytes(content)
    found = outcome(LearnerState.read, folder)
    if isinstance(found, LearnerState):
        assert isinstance(found.kl_coef, float) and isinstance(found.moments, RunningMoments)


@given(content=st.one_of(mutated(EVALUATION), damaged(json.dumps(EVALUATION).encode())))
def test_an_evaluation(folder: Path, content: bytes) -> None:
    (folder / "e.json").write_bytes(content)
    found = outcome(Evaluation.read, folder / "e.json")
    if isinstance(found, Evaluation):
        assert all(isinstance(sample, Sample) for sample in found.samples)


@given(sums=st.one_of(st.dictionaries(st.text(), json_values), json_values))
def test_checksums(folder: Path, sums: Any) -> None:
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert isinstance(outcome(verify, folder), PPORayError) or sums == {}


@given(content=damaged(json.dumps({"run.json": [9, "a" * 16], "a/b": [0, ""]}).encode()))
def test_damaged_checksums(folder: Path, content: bytes) -> None:
    (folder / "checksums.json").write_bytes(content)
    assert isinstance(outcome(verify, folder), PPORayError) or json.loads(content) == {}


@given(content=damaged(b'{"step": 0, "score/mean": 1.0}\n{"event": "resumed", "step": 1}\n{"step": 1, "a": null}\n'))
def test_a_log_of_metrics(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    outcome(has_steps, folder)
    outcome(read_steps, folder)


CONFIG = {
    "output_dir": "run",
    "model": {"path": "policy", "dtype": "float32"},
    "prompts": {"path": "p.parquet", "min_chars": 5},
    "reward": {"path": "classifier", "label": "POSITIVE"},
    "ppo": {"learning_rate": 1e-5, "kl_controller": "fixed"},
    "rollout": {"batch_size": 8, "temperature": 1.0},
}


@given(content=st.one_of(mutated(CONFIG), damaged(json.dumps(CONFIG, indent=1).encode())))
def test_a_config(folder: Path, content: bytes) -> None:
    (folder / "config.yaml").write_bytes(content)
    outcome(load_config, folder / "config.yaml")
    outcome(load_evaluation_config, folder)


@given(override=st.text(max_size=60), value=st.text(max_size=30))
def test_an_override(override: str, value: str) -> None:
    base = ["output_dir=run", "model.path=m", "prompts.path=p", "reward.path=c"]
    outcome(load_config, None, [*base, override])
    outcome(load_config, None, [*base, f"ppo.learning_rate={value}"])
