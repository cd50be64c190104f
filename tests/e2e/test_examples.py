"""The examples, as a user runs them, on tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import SENTENCES

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_sentiment_notebook(tiny_policy: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    reviews = [" ".join(SENTENCES[start : start + 3]) for start in range(40)]  # over 200 characters
    pq.write_table(pa.table({"text": reviews}), tmp_path / "reviews.parquet")
    models = ("--policy", str(tiny_policy), "--classifier", str(tiny_classifier))
    options = ("--prompts", str(tmp_path / "reviews.parquet"), "--steps", "2", "--batch-size", "8")
    result = subprocess.run(
        [sys.executable, EXAMPLES / "sentiment_trl.py", *models, *options, "--output", str(tmp_path / "trained")],
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mean score") == 2
    assert "KL 0.000" in result.stdout.splitlines()[0]  # the first batch is sampled by the reference itself
    assert "rewards (before)" in result.stdout and "rewards (after)" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").num_parameters() > 0
