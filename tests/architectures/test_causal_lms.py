"""Every causal LM of the installed transformers, tiny and random: exact in the learner and in engines, or refused.

`docs/models.md` lists the verdicts, and these tests hold it to them.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

from ppo_ray.plan.adapters import ADAPTABLE
from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, ENVIRONMENT
from tests.architectures.causal_lms import judge, merge_adapters
from tests.architectures.table import ARCHITECTURES, COLUMNS, NOT_TRIED, read_table
from tests.architectures.tiny import chosen

TABLE = read_table()
SERVED = [name for name in ARCHITECTURES if TABLE[name]["vLLM"] == "exact"]


@pytest.mark.parametrize("name", chosen(ARCHITECTURES))
def test_an_architecture_is_as_the_table_says(name: str, tmp_path: Path) -> None:
    for column, verdict in judge(name, tmp_path, COLUMNS[:2]).items():
        wanted = TABLE[name][column]
        assert verdict == wanted, column


@pytest.mark.parametrize("name", chosen([name for name in ARCHITECTURES if TABLE[name]["learner"] == "exact"]))
def test_adapters_merge_to_what_they_compute_or_are_refused(name: str) -> None:
    found = merge_adapters(name)
    if isinstance(found, str):
        assert found.startswith(("models of the kind", "peft cannot adapt", "peft would put adapters into")), found
    else:
        assert found < 1e-3, name


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """Start a process for vLLM: beside an engine of another test that lives yet, it cannot start for any model."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**ENVIRONMENT, **CPU_ENVIRONMENT}.items():  # read when vllm is imported
                patch.setenv(name, value)
            executor.submit(os.getpid).result(timeout=120)  # by now it has been started, and has its environment
        yield executor


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([name for name in SERVED if name in ADAPTABLE], size=1))
def test_vllm_serves_adapters_alone(name: str, tmp_path: Path, process: Executor) -> None:
    assert process.submit(judge, name, tmp_path, ["adapters"]).result(timeout=300) == {"adapters": "exact"}


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen(SERVED, size=2))
def test_vllm_serves_an_architecture_as_the_table_says(name: str, tmp_path: Path, process: Executor) -> None:
    assert process.submit(judge, name, tmp_path, ["vLLM"]).result(timeout=300) == {"vLLM": "exact"}


def test_the_table_lists_the_architectures_of_the_installed_transformers() -> None:
    """After another transformers: `python -m tests.architectures.table`."""
    assert list(TABLE) == ARCHITECTURES


def test_what_is_listed_is_exact_or_says_why_not() -> None:
    for name, verdicts in TABLE.items():
        assert verdicts["learner"].startswith(("exact", "refused: ")), name
        for column in COLUMNS[1:]:
            served = verdicts["learner"] == "exact"
            said = verdicts[column].startswith(
                ("exact", "within ", "refused: ", NOT_TRIED)
            )  # nothing wrong, no failure
            assert said if served else not verdicts[column], name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reformer", "computes gradients in training mode alone, with dropout"),
        ("emu3", "is a part of another (emu3_text_model), which AutoModelForCausalLM does not load by itself"),
        ("gemma4_assistant", "cannot be run on token ids alone (KeyError: 'sliding_attention')"),
        ("musicgen", "is an encoder-decoder (musicgen)"),
    ],
)
def test_models_that_would_fail_in_words_of_their_own_are_refused(name: str, words: str, tmp_path: Path) -> None:
    assert f"refused: {words}" in judge(name, tmp_path, COLUMNS[:1])["learner"]
