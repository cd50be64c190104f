"""The checks of a GPU, as far as a CPU can make them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_acceptance, gpu_checks, gpu_ranks, gpu_runs
from benchmarks.gpu_checks import Bench, Figure
from ppo_ray import preflight
from ppo_ray.config import load_config, weight_transport
from ppo_ray.plan import ClusterShape, ModelSizes, make_plan
from ppo_ray.plan.cluster import GIB


def figures(file: Path, name: str) -> dict[str, object]:
    return {figure["name"]: figure["value"] for figure in json.loads(file.read_text())[name]["figures"]}


def test_checks_by_torch_alone_pass_and_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "checks.json"
    names = ["machine", "update", "codes", "logits", "sums", "lending", "memory", "nccl", "tensor_parallel"]
    assert gpu_acceptance.main(["--only", *names, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    skipped = set() if torch.cuda.device_count() > 1 else {"nccl", "tensor_parallel"}
    skipped |= set() if torch.cuda.is_available() else {"lending"}
    skipped |= set() if importlib.util.find_spec("bitsandbytes") else {"codes"}
    assert {name for name in names if found[name]["outcome"] == "skipped"} == skipped
    assert 0 < float(str(figures(file, "update")["update in bfloat16, weights"])) < 0.02
    assert "0 of 9 checks failed" in capsys.readouterr().out


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


def test_ranks_that_do_not_share_their_gradients_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever learns from its own share alone has other weights than one rank that learns from all."""
    bench, ranks = Bench(torch.device("cpu"), tmp_path), gpu_ranks.Ranks
    alone = gpu_ranks._learn(bench.write_model("tiny"), "float32", ranks(), "ddp", [0])
    monkeypatch.setattr(ranks, "_reduce", lambda *arguments: None)
    apart = gpu_ranks._learn(bench.write_model("tiny"), "float32", ranks(1, 2), "ddp", [0])
    assert gpu_checks.distance(alone, apart) > gpu_checks.FLOAT32


def test_checks_of_two_gpus_are_skipped_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("ranks", "nccl", "tensor_parallel"):
        with pytest.raises(gpu_checks.Skipped, match="it needs two GPUs, and there is one"):
            next(gpu_acceptance.CHECKS[name](Bench(torch.device("cuda"), tmp_path)))


@pytest.mark.parametrize(("options", "transport"), [(gpu_runs.NCCL, "nccl"), (gpu_runs.TENSOR_PARALLEL, "ipc")])
def test_runs_on_two_gpus_fit_them(options: tuple[str, ...], transport: str, tmp_path: Path) -> None:
    file, _ = gpu_runs.write_config(Bench(torch.device("cpu"), tmp_path), "run")
    config = load_config(file, list(options))
    plan = make_plan(config, ClusterShape.uniform(1, 16, 2, 128 * GIB, 79 * GIB), ModelSizes.read(config))
    assert plan.shortages == () and weight_transport(config) == transport
    assert len(plan.gpus) == 2 and preflight.check(config)


def test_a_wrong_checksum_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))
    monkeypatch.setattr(gpu_checks, "format_sums", lambda sums: [str(next(count))])
    assert gpu_acceptance.main(["--only", "sums"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engine_run_and_ranks_pass_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "checks.json"
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--only", *("vllm", "run", "ranks")]
    command += ["--json", str(file)]
    made = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=550)
    assert made.returncode == 0, made.stdout
    run = figures(file, "run")
    assert (run["engines killed"], run["steps missing"]) == (1, 0)
    assert float(str(figures(file, "vllm")["float32 engine against learner, new weights, nats"])) < 1e-4
    ranks = {name: float(str(value)) for name, value in figures(file, "ranks").items()}
    assert len(ranks) == 9 and max(value for name, value in ranks.items() if "float32" in name) < 1e-5
