"""The task of configs/assistant.yaml: critics' words as chat messages, and a reward model with a chat template."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEMPLATE = "{{ cls_token }}{{ messages[-1].content }}{{ sep_token }}"
"""What the reward model reads of a conversation: the answer alone, between the special tokens of its training."""


def write_chats(path: Path, sentences: pa.Table) -> None:
    """Write a chat about each critic's sentence to a Parquet file: the column `messages`.

    Args:
        path: the file.
        sentences: `text`.
    """
    texts = dict.fromkeys(text.strip() for text in sentences.column("text").to_pylist())
    chats = [[{"role": "user", "content": f'A critic writes: "{text}" What do you say to that?'}] for text in texts]
    pq.write_table(pa.table({"messages": chats}), path)


def make_reward_model(classifier: Path, folder: Path) -> None:
    """Make a reward model of a sequence classifier: its tokenizer gets a chat template.

    Args:
        classifier: folder of the classifier and its tokenizer.
        folder: of the reward model.
    """
    from transformers import AutoTokenizer

    shutil.copytree(classifier, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def score_end(finish_reasons: Sequence[str]) -> list[float]:
    """Return 1 for a response that ended by itself, 0 for one that was cut off at its limit."""
    return [float(reason == "stop") for reason in finish_reasons]
