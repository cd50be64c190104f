"""The benchmark of one GPU, on the CPU with a tiny model: the same code, and what it must refuse."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.card import data_sheet_peak, find_peak
from benchmarks.gpu_work import WORKS, Work, make_config

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the figures below are those of a CPU")


@on_cpu
def test_a_tiny_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "figures" / "gpu.json"
    gpu.main(["--steps", "2", "--batch-size", "4", "--json", str(file)])
    record = json.loads(file.read_text())
    (result,) = record["results"]
    assert (result["work"], result["batch_size"], result["response_tokens"]) == ("tiny", 4, [4, 16])
    seconds = result["seconds"]
    assert set(seconds) == set(gpu.PHASES) and all(value > 0 for value in seconds.values())
    assert seconds["forwards_s"] + seconds["update_s"] <= seconds["learner_s"]  # medians of two are means
    assert seconds["step_s"] > seconds["learner_s"]
    assert result["samples_per_s"] == pytest.approx(4 / seconds["step_s"])
    assert all(0 < result[name] < 1.5 for name in ("learner_mfu", "generate_mfu", "step_mfu"))
    assert result["peak_memory_gib"] > 0.1
    assert record["peak"]["source"] == "a large product, measured"
    assert "MFU of the learner" in capsys.readouterr().out


@on_cpu
def test_utilisation_is_operations_over_seconds_over_the_peak(tmp_path: Path) -> None:
    # tiny: a layer is 2 x 64^2 + 2 x 64 x 32 + 3 x 64 x 128 = 36864 weights, two of them; the head 64 x 512
    file = tmp_path / "gpu.json"
    gpu.main(
        ["--steps", "1", "--batch-size", "1", "--response-tokens", "20", "--peak-tflops", "2", "--json", str(file)]
    )
    record = json.loads(file.read_text())
    (result,) = record["results"]
    forward = result["generate_mfu"] * result["seconds"]["generate_s"] * 2e12
    update = result["learner_mfu"] * result["seconds"]["learner_s"] * 2e12
    assert update == pytest.approx(13 * forward)  # the reference, and four epochs of three
    tokens = [prompt + 19 for prompt in range(2, 9)]
    possible = [2 * 73728 * n + 2 * 32768 * 20 + 2 * 4 * 64 * n * (n + 1) / 2 for n in tokens]
    assert any(forward == pytest.approx(flops) for flops in possible)
    assert record["peak"] == {"tflops": 2.0, "source": "given"}


@on_cpu
def test_a_learner_alone_with_a_critic_or_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"ppo.epochs": 1, "ppo.minibatch_size": 2, "learner.microbatch_tokens": 64}
    for name, more in (("critic", {"model.critic": "separate"}), ("adapters", {"model.lora": {"rank": 2}})):
        work = Work("tiny", 4, (6, 6), (5, 5), options | more, alone=True, published_s=3.5)
        monkeypatch.setitem(WORKS, name, work)
        file = tmp_path / "gpu.json"
        gpu.main(["--work", name, "--steps", "1", "--peak-tflops", "2", "--json", str(file)])
        (result,) = json.loads(file.read_text())["results"]
        assert result["generate_mfu"] is None and result["published_s"] == 3.5
        assert result["tokens_per_s"] == pytest.approx(44 / result["seconds"]["step_s"])
        layers, head = 4 * (2 * 73728 * 10 + 2 * 4 * 64 * 55), 4 * 2 * 32768 * 5
        found = result["learner_mfu"] * result["seconds"]["learner_s"] * 2e12
        assert found == pytest.approx({"critic": 7 * layers + 4 * head, "adapters": 3 * (layers + head)}[name])


@pytest.mark.parametrize("name", WORKS)
def test_each_work_is_a_config(name: str, tmp_path: Path) -> None:
    config = make_config(name, gpu.make_parser().parse_args([]), tmp_path)
    assert config.rollout.batch_size == WORKS[name].batch_size
    assert config.max_context >= WORKS[name].prompts[1] + WORKS[name].responses[1]


def test_another_batch_has_as_many_mini_batches(tmp_path: Path) -> None:
    config = make_config("0.5b", gpu.make_parser().parse_args(["--batch-size", "8"]), tmp_path)
    assert (config.rollout.batch_size, config.ppo.minibatch_size) == (8, 2)


def test_too_little_memory_is_said_in_words_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 8 << 30)
    monkeypatch.setattr(gpu, "write_model", lambda *args: pytest.fail("weights were made"))
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--work", "1b"])
    message = capsys.readouterr().err
    assert "1b needs about" in message and "has 8.0 GiB free" in message
    assert "Adam's two moments" in message and "--microbatch-tokens" in message


def test_running_out_of_memory_is_said_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run_out(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(gpu, "write_model", run_out)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--work", "tiny", "--peak-tflops", "1"])
    assert "Tried to allocate 20.00 GiB. Lower --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a slice of it
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_cards_are_known_by_their_names(card: str, peak: float | None) -> None:
    assert data_sheet_peak(card) == peak


def test_a_card_that_is_not_listed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.card._product_tflops", lambda device: 7.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Something New")
    assert find_peak(torch.device("cuda")).tflops == 7.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert find_peak(torch.device("cuda")).tflops == 121.0
