"""Engines with models that are not built as Llama is: experts, tied heads, recurrent states, value heads in files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from ppo_ray.errors import WorkerError
from ppo_ray.rollout.engine import Sampling
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.trl import AutoModelForCausalLMWithValueHead
from ppo_ray.weights.snapshot import WeightSnapshot
from tests.rollout.comparison import REQUESTS, DistantVLLM, compare_engine, largest_difference, reference

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ENDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def save(folder: Path, config: Any) -> Path:
    """Save a random model whose weights matter: scaled by their number of inputs, norms and biases not 1 and 0."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (2 / parameter.shape[-1]) ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: MixtralConfig(**SIZES, **ENDS, num_local_experts=4, num_experts_per_tok=2, head_dim=32),
        # 24: vLLM pads its packed experts
        lambda: Qwen3MoeConfig(**SIZES, **ENDS, **EXPERTS, moe_intermediate_size=24, head_dim=32),
        lambda: BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=2, **ENDS),
        lambda: GPTNeoXConfig(**SIZES, **ENDS, tie_word_embeddings=True),
    ],
    ids=["mixtral", "padded experts", "bloom", "tied neox"],
)
def test_vllm_serves_new_weights_of_models_that_it_packs(
    distant_vllm: DistantVLLM, tmp_path: Path, make: Callable[[], Any]
) -> None:
    distant_vllm.start(save(tmp_path, make()))
    off, moved = compare_engine(distant_vllm, tmp_path)
    assert off < 1e-4 and moved > 0.5


@pytest.mark.slow
def test_vllm_serves_a_folder_with_a_value_head_among_the_tensors(distant_vllm: DistantVLLM, tmp_path: Path) -> None:
    """Heads of 48, which vLLM does not name among the sizes it has attention for, and has."""
    save(tmp_path / "plain", LlamaConfig(**{**SIZES, "hidden_size": 96}, **ENDS))
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "policy")
    distant_vllm.start(tmp_path / "policy")
    off, moved = compare_engine(distant_vllm, tmp_path / "plain")
    assert off < 1e-4 and moved > 0.5
    model = reference(tmp_path / "plain")
    *kept, (name, _) = model.named_parameters()
    with pytest.raises(WorkerError, match=f"weights are of another model: names differ, {name}"):
        distant_vllm.load_weights(WeightSnapshot.take(kept, 3))
    distant_vllm.load_weights(WeightSnapshot.take(model.named_parameters(), 4))  # nothing was changed
    assert largest_difference(model, distant_vllm.generate(REQUESTS, Sampling())) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MptConfig(vocab_size=512, d_model=64, n_heads=2, n_layers=1), "MptForCausalLM was supported in vLLM until"),
        (
            # which vLLM says only when it is asked for a token
            JambaConfig(**SIZES, **ENDS, **EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
            "selective_scan_fwd",
        ),
    ],
    ids=["mpt", "jamba"],
)
def test_what_vllm_cannot_serve_is_one_sentence_at_its_start(
    distant_vllm: DistantVLLM, tmp_path: Path, config: Any, words: str
) -> None:
    with pytest.raises(WorkerError) as caught:
        distant_vllm.start(save(tmp_path, config))
    message = str(caught.value)
    assert message.startswith(f"vLLM does not start with '{tmp_path}': ") and words in message
    assert message.endswith(". rollout.engine=hf samples with transformers, slower, from any model the learner takes")
    assert len(message) < 500 and "\n" not in message


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (lambda: LlamaConfig(**SIZES, **ENDS), True),
        (lambda: BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=2, **ENDS), True),
        (lambda: MptConfig(vocab_size=512, d_model=64, n_heads=2, n_layers=2, max_seq_len=128), True),
        (lambda: MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8, **ENDS), False),
        (
            lambda: Qwen3NextConfig(
                **SIZES,
                **ENDS,
                **EXPERTS,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
                head_dim=32,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                linear_key_head_dim=32,
                linear_value_head_dim=32,
                full_attention_interval=2,
            ),
            False,
        ),
    ],
    ids=["llama", "bloom", "mpt", "mamba", "qwen3-next"],
)
def test_transformers_samples_alone_what_it_cannot_sample_in_a_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[], Any], batches: bool
) -> None:
    engine = HFEngine(str(save(tmp_path, make())), max_context=128)
    off, moved = compare_engine(engine, tmp_path)
    assert off < 1e-4 and moved > 0.5
    said = [record.getMessage() for record in caplog.records if record.name == "ppo_ray.rollout.hf"]
    assert [message.partition(" gives other logits")[0] for message in said] == (
        [] if batches else [f"the model '{tmp_path}'"]
    )


def test_what_a_model_cannot_do_in_a_batch_is_wrong_in_a_batch(tmp_path: Path) -> None:
    """So that the trial at the start is no mere habit."""
    config = MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8, **ENDS)
    engine = HFEngine(str(save(tmp_path, config)), max_context=128)
    alone = engine.generate(REQUESTS, Sampling())
    engine._batches = True
    with pytest.raises((AttributeError, AssertionError)):
        assert engine.generate(REQUESTS, Sampling()) == alone
