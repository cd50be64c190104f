"""Models with random weights, in folders that the package loads: what a benchmark costs does not depend on the weights.

Each comes with a tokenizer whose words are `w0`, `w1`, ... for the ids 0, 1, ...; none of them ends a response.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.flops import DecoderShape


def _llama(
    vocab: int, hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, tied: bool = True
) -> LlamaConfig:
    """Return a Llama, its head tied to its embeddings or not."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: _llama(vocab=512, hidden=64, layers=2, intermediate=128, heads=2, kv_heads=1),
    "16m": lambda: _llama(vocab=16384, hidden=384, layers=6, intermediate=1024, heads=6, kv_heads=2),
    "58m": lambda: _llama(vocab=32768, hidden=512, layers=14, intermediate=1408, heads=8, kv_heads=4),
    "135m": lambda: _llama(vocab=49152, hidden=576, layers=30, intermediate=1536, heads=9, kv_heads=3),
    "notebook": lambda: GPT2Config(vocab_size=50257, bos_token_id=None, eos_token_id=0, pad_token_id=0),
    "0.5b": lambda: _llama(vocab=151936, hidden=896, layers=24, intermediate=4864, heads=14, kv_heads=2),
    "1b": lambda: _llama(vocab=128256, hidden=2048, layers=16, intermediate=8192, heads=32, kv_heads=8),
    "1.5b": lambda: _llama(vocab=151936, hidden=1536, layers=28, intermediate=8960, heads=12, kv_heads=2),
    "8b": lambda: _llama(vocab=128256, hidden=4096, layers=32, intermediate=14336, heads=32, kv_heads=8, tied=False),
}
"""By name: a tiny one, three sizes of the same proportions (135m is SmolLM2's), GPT-2's 124M, Qwen 2.5's 0.5B and 1.5B
without biases, Llama 3.2's 1B and Llama 3.1's 8B."""


def decoder_shape(config: Any) -> DecoderShape:
    """Return the sizes by which operations are counted.

    GPT-2's layers have two maps from and to a width where a Llama's have three: as many weights at 2/3 of that width.
    """
    if config.model_type != "gpt2":
        return DecoderShape.of(config.to_dict())
    hidden = config.n_embd
    intermediate = (config.n_inner or 4 * hidden) * 2 // 3
    return DecoderShape(config.n_layer, hidden, intermediate, hidden, hidden, config.vocab_size)


def write_config(shape: str, folder: Path) -> Any:
    """Write a shape's config and tokenizer into a folder, from which its size can be told; returns the config."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = SHAPES[shape]()
    config.architectures = [{"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[config.model_type]]
    config.save_pretrained(folder)
    words = {f"w{index}": index for index in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0", unk_token="w1")
    fast.save_pretrained(folder)
    return config


def write_model(shape: str, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Write config, tokenizer and weights, drawn on a device from a seed of their own; returns the config."""
    config = write_config(shape, folder)
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return config
