"""Models that the first rank alone reads: what the ranks hold while they load, and errors that all ranks share."""

import ctypes
import gc
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig
from ppo_ray.learner.fsdp import gather_full
from ppo_ray.learner.loading import load_models
from ppo_ray.learner.ranks import Ranks
from tests.conftest import make_tokenizer
from tests.learning import load_learner, make_table
from tests.rank_processes import rank_processes

MIB = 1 << 20


@pytest.fixture(scope="module")
def large_policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Yield the folder of a Llama in bfloat16, and its bytes in float32, some 100 MiB: a file of float32 is mapped."""
    folder = tmp_path_factory.mktemp("large-policy")
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, eos_token_id=0, pad_token_id=0))
    model.bfloat16().save_pretrained(folder)
    make_tokenizer(folder)
    yield folder, sum(4 * parameter.numel() for parameter in model.parameters())
    shutil.rmtree(folder)


@contextmanager
def watch_memory(found: list[int]) -> Iterator[None]:
    """Append the bytes that this process holds at most in a block beyond what it held before, mapped files left out."""
    process, peak, stop = psutil.Process(), 0, threading.Event()

    def held() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    def sample() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, held())

    before = held()
    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        yield
    finally:
        stop.set()
        sampling.join()
        found.append(max(peak, held()) - before)


def load(ranks: Ranks, folder: Path, model: dict[str, Any]) -> Any:
    return load_learner(folder, model, {"sharding": "fsdp2"}, {}, ranks)


def measure_load(ranks: Ranks, warm: Path, folder: Path, model: dict[str, Any]) -> int:
    """Return the bytes that this rank holds at most while it loads; the libraries were loaded with another model."""

    def load_alone(path: Path) -> Any:  # without the optimizer's state
        config, learner = ModelConfig.model_construct(path=str(path), **model), LearnerConfig(sharding="fsdp2")
        return load_models(config, learner, 1.0, 0, torch.device("cpu"), ranks)

    load_alone(warm)
    gc.collect()
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, MIB)  # M_MMAP_THRESHOLD: what is freed goes back at once, as a large model's tensors do
    allocator.malloc_trim(0)  # what was freed before and kept would hide what is held
    found: list[int] = []
    with watch_memory(found):
        load_alone(folder)
    return found[0]


def test_the_first_of_three_ranks_alone_holds_a_model_and_only_once(
    large_policy: tuple[Path, int], tiny_policy: Path, crew: Any
) -> None:
    check_memory(crew, tiny_policy, *large_policy)


def test_the_first_of_two_ranks_alone_holds_a_model_and_only_once(
    large_policy: tuple[Path, int], tiny_policy: Path
) -> None:
    with rank_processes(2) as processes:
        check_memory(processes, tiny_policy, *large_policy)


def check_memory(processes: Any, warm: Path, folder: Path, num_bytes: int) -> None:
    """Policy, critic and reference, each of 100 MiB: shards of all three are left."""
    size, peaks = len(processes.processes), processes.run(measure_load, warm, folder, {"critic": "separate"})
    assert all(isinstance(peak, int) for peak in peaks), peaks
    shares = 3 * num_bytes / size
    largest = 4096 * 512 * 4
    # before the last model is read, two thirds of the shares are there; then the model becomes the last third
    assert num_bytes < peaks[0] < 2 / 3 * shares + 1.5 * num_bytes
    for peak in peaks[1:]:
        assert peak < shares + 2 * largest + 0.1 * num_bytes


def look_at(ranks: Ranks | None, folder: Path, model: dict[str, Any]) -> dict[str, tuple[torch.Tensor, bool]]:
    """Return every parameter and buffer of policy and reference, whole, and whether it is trained."""
    learner = load(ranks or Ranks(), folder, model)
    found = {}
    for label, network in (("policy", learner._policy), ("reference", learner._reference)):
        tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            found[f"{label}.{name}"] = gather_full(tensor).clone(), tensor.requires_grad
    return found


def make_experts(folder: Path) -> Path:
    """Make a model whose experts lie one by one in its file, and in one tensor in memory."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 5}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=400, num_experts_per_tok=2, **sizes, **heads)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


ADAPTERS = {"lora": LoraConfig(rank=3), "dtype": "bfloat16"}


@pytest.mark.parametrize("model", [{}, {"critic": "separate"}, ADAPTERS, ADAPTERS | {"critic": "separate"}])
def test_all_ranks_have_the_values_of_a_whole_model(tiny_policy: Path, crew: Any, model: dict[str, Any]) -> None:
    check_values(crew, tiny_policy, model)


def test_all_ranks_get_saved_adapters_and_the_value_head_beside_them(
    tiny_policy: Path, crew: Any, tmp_path: Path
) -> None:
    learner = load_learner(tiny_policy, ADAPTERS | {"critic": "separate"}, {}, {})
    learner.update(make_table(8), 0)
    learner.save(tmp_path / "saved")
    saved = {"lora": LoraConfig(path=str(tmp_path / "saved"))}
    check_values(crew, tiny_policy, ADAPTERS | {"critic": "separate"} | saved)


def test_experts_are_put_together_by_the_first_rank(crew: Any, tmp_path: Path) -> None:
    check_values(crew, make_experts(tmp_path / "experts"), {"critic": "separate"})


def check_values(crew: Any, folder: Path, model: dict[str, Any]) -> None:
    wanted = look_at(None, folder, model)
    assert any("inv_freq" in name for name in wanted)
    for found in crew.run(look_at, folder, model):
        assert not isinstance(found, str), found
        assert found.keys() == wanted.keys()
        for name, (tensor, is_trained) in wanted.items():
            assert torch.equal(found[name][0], tensor) and found[name][0].dtype == tensor.dtype, name
            assert found[name][1] == is_trained, name


def load_of_rank(ranks: Ranks, *folders: Path) -> None:
    load(ranks, folders[ranks.rank], {})


def test_an_error_of_any_rank_is_that_of_all(tiny_policy: Path, crew: Any, tmp_path: Path) -> None:
    """NaN is seen where weights are read, on the first rank; what no rank but one lacks or has, there."""
    damaged = Path(shutil.copytree(tiny_policy, tmp_path / "damaged"))
    model = LlamaForCausalLM.from_pretrained(damaged)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(damaged)
    for folders, words in (
        ([damaged] * 3, "InputError: .*damaged' has NaN or infinite weights: model.norm.weight"),
        ([tiny_policy, tiny_policy, tmp_path / "nothing"], "InputError: cannot load the model '.*nothing'"),
        ([tiny_policy, make_experts(tmp_path / "experts"), tiny_policy], "InputError: on learner rank 1's node"),
    ):
        first, *others = crew.run(load_of_rank, *folders)
        assert re.match(words, first), first
        assert others == [first] * 2
