"""The task of configs/toy.yaml: a tiny policy with random weights, one token per character, learns to write vowels."""

import string
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_CHARACTERS = string.ascii_lowercase + " " + string.digits + ".?:\n"
_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
_VOWELS = frozenset("aeiou")
_FIRST = ("the old", "a small", "one red", "my last", "this slow", "her best", "no other", "every new")
_SECOND = ("house", "train", "garden", "letter", "winter", "song", "river", "story")


def build_words(path: Path) -> None:
    """Write 64 short texts to a Parquet file, in the column `text`."""
    pq.write_table(pa.table({"text": [f"{first} {second} " for first in _FIRST for second in _SECOND]}), path)


def build_toy(folder: Path) -> None:
    """Write a two-layer Llama of 0.3 million parameters with random weights, and its tokenizer.

    The tokens are 41 characters and an end. Capitals become small letters, and what is no token is left out. There is
    a chat template, so that the policy can stand in for any chat model.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ids = {"<eos>": 0, **{character: index for index, character in enumerate(_CHARACTERS, 1)}}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Lowercase(), decoders.Fuse()
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = _CHAT
    fast.save_pretrained(folder)


def score_vowels(responses: Sequence[str]) -> list[float | None]:
    """Return the share of vowels among each response's characters; None for an empty response."""
    return [sum(letter in _VOWELS for letter in text) / len(text) if text else None for text in responses]
