"""The checks of a GPU, as far as a CPU can make them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_acceptance, gpu_checks
from benchmarks.gpu_checks import Bench, Figure


def figures(file: Path, name: str) -> dict[str, object]:
    return {figure["name"]: figure["value"] for figure in json.loads(file.read_text())[name]["figures"]}


def test_checks_by_torch_alone_pass_and_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "checks.json"
    names = ["machine", "update", "logits", "sums", "lending", "memory"]
    assert gpu_acceptance.main(["--only", *names, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    skipped = set() if torch.cuda.is_available() else {"lending"}
    assert {name for name in names if found[name]["outcome"] == "skipped"} == skipped
    assert 0 < float(str(figures(file, "update")["update in bfloat16, weights"])) < 0.02
    assert "0 of 6 checks failed" in capsys.readouterr().out


def test_a_figure_beyond_its_limit_and_an_error_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Figure("a", 1.0, 1.0).passed and Figure("a", "words").passed
    assert not Figure("a", 1.1, 1.0).passed and not Figure("a", float("nan"), 1.0).passed

    def break_down(bench: Bench):
        yield Figure("before", 1)
        raise RuntimeError("no kernel image")

    file = tmp_path / "checks.json"
    monkeypatch.setitem(gpu_acceptance.CHECKS, "sums", break_down)
    assert gpu_acceptance.main(["--only", "sums", "machine", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert (found["sums"]["outcome"], found["machine"]["outcome"]) == ("failed", "passed")
    assert "no kernel image" in str(figures(file, "sums")["error"])


def test_a_wrong_checksum_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))
    monkeypatch.setattr(gpu_checks, "format_sums", lambda sums: [str(next(count))])
    assert gpu_acceptance.main(["--only", "sums"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engine_and_run_pass_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "checks.json"
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--only", "vllm", "run", "--json", str(file)]
    made = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=550)
    assert made.returncode == 0, made.stdout
    run = figures(file, "run")
    assert (run["engines killed"], run["steps missing"]) == (1, 0)
    assert float(str(figures(file, "vllm")["float32 engine against learner, new weights, nats"])) < 1e-4
