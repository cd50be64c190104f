from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from ppo_ray.assets.assistant import make_reward_model, score_end, write_chats
from ppo_ray.reward.classifier import Classifier


def test_chats_hold_each_sentence_once(tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.parquet", pa.table({"text": ["so good ", "so bad", "so good"]}))
    chats = pq.read_table(tmp_path / "chats.parquet").column("messages").to_pylist()
    assert [[(turn["role"], turn["content"]) for turn in chat] for chat in chats] == [
        [("user", f'A critic writes: "{text}" What do you say to that?')] for text in ("so good", "so bad")
    ]


def test_the_reward_model_reads_the_answer_as_the_classifier_read_its_texts(
    tiny_classifier: Path, tmp_path: Path
) -> None:
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    for file in tiny_classifier.iterdir():
        (classifier / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    tokenizer.save_pretrained(classifier)
    make_reward_model(classifier, tmp_path / "made")
    chats = [
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}] for text in ("so good", "no")
    ]
    found = Classifier(str(tmp_path / "made"), chat_template="tokenizer").score(chats)
    wanted = Classifier(str(classifier)).score(["<cls>so good<sep>", "<cls>no<sep>"])
    assert found == pytest.approx(wanted, abs=1e-6)


def test_what_ended_by_itself() -> None:
    assert score_end(["stop", "length"]) == [1, 0]
