"""TRL itself, in its own environment: skipped where `make benchmark` has not made it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compare import child, work
from benchmarks.compare.arms import step_from
from benchmarks.compare.rounds import TRL_PYTHON, _check_step
from tests.benchmarks.test_work import SCRIPT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TRL_PYTHON.is_file(), reason="there is no .venv-trl")]

LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.arange(1, 9)[None]).logits[0, -1].tolist())
"""


def test_the_older_library_computes_the_same_policy(config, tmp_path):
    folder = work.older_copy(Path(config.model.path), tmp_path / "policy")
    result = subprocess.run([TRL_PYTHON, "-c", LOGITS, folder], capture_output=True, text=True, check=True)
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(config.model.path)(torch.arange(1, 9)[None]).logits[0, -1]
    assert torch.allclose(torch.tensor(json.loads(result.stdout)), wanted, atol=1e-4)


@pytest.mark.parametrize("mode", ["one", "batched"])
def test_trl_does_the_work(mode, config, tmp_path):
    asked = work.trl_work(config, mode, 1, tmp_path)
    (tmp_path / "work.json").write_text(json.dumps(asked))
    command = [str(TRL_PYTHON), str(SCRIPT), str(tmp_path / "work.json"), str(tmp_path / "steps.jsonl")]
    child.run(command, tmp_path / "log", 120, lambda: None, {})
    steps = [step_from(json.loads(line)) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    for step, portion in zip(steps, work.portions(config), strict=True):
        _check_step(mode, step, portion)
        assert 0 <= step.phases["other"] < step.total_s and step.seconds["update"] > 0
    assert abs(steps[0].figures["kl"]) < 1e-4 and steps[0].figures["value_loss"] > 0
