"""Floating-point operations of a decoder on the tokens that matter: no padding, no head where nothing is predicted.

A sequence of P prompt and R response tokens needs P + R - 1 tokens in its layers, R in its head, and attention from
each token to itself and all before it. A product of a weight with a token is two operations. Generation with a cache
and a forward pass over the whole need the same; a backward pass needs twice a forward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def forward_flops(config: Any, prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> float:
    """Count a forward pass over sequences.

    Args:
        config: of a causal language model of transformers, whose every layer attends to all that is before.
        prompt_lengths: tokens of each prompt, at least 1.
        response_lengths: tokens of each response, at least 1.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers, head = _weights(config)
    flops = 0.0
    for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
        tokens = prompt + response - 1
        attended = tokens * (tokens + 1) / 2  # pairs; each is a product for its weight, and one with its value
        flops += 2 * layers * tokens + 2 * head * response + 4 * heads * width * attended * text.num_hidden_layers
    return flops


def update_flops(config: Any, prompt_lengths: Sequence[int], response_lengths: Sequence[int], epochs: int) -> float:
    """Count a PPO update: policy and reference look at all sequences, then each epoch is a forward and a backward."""
    return (2 + 3 * epochs) * forward_flops(config, prompt_lengths, response_lengths)


def _weights(config: Any) -> tuple[int, int]:
    """Count the weights that every token meets in the layers, and those of the head, tied or not."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return sum(module.weight.numel() for module in linear if module is not head), head.weight.numel()
