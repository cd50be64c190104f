"""Which output of a classifier is meant."""

from types import SimpleNamespace

import pytest
from transformers import BertConfig, LlamaConfig, MptConfig, XLNetConfig

from ppo_ray.errors import InputError
from ppo_ray.reward.labels import check_transform, find_label, token_limit


def test_a_label_is_found_by_its_name() -> None:
    assert find_label({0: "POSITIVE", 1: "NEGATIVE"}, "NEGATIVE", "m") == 1


def test_a_nameless_only_label_is_the_one_meant() -> None:
    assert find_label({0: "LABEL_0"}, "POSITIVE", "m") == 0


@pytest.mark.parametrize(
    ("labels", "known"), [({0: "TOXIC"}, "TOXIC"), ({0: "LABEL_0", 1: "LABEL_1"}, "LABEL_0, LABEL_1"), ({}, "none")]
)
def test_what_there_is_instead_is_said(labels: dict[int, str], known: str) -> None:
    with pytest.raises(InputError, match=f"reward.label=POSITIVE: some/model has no such label; it has {known}"):
        find_label(labels, "POSITIVE", "some/model")


def test_a_name_that_two_labels_have_is_refused() -> None:
    with pytest.raises(InputError, match="some/model has several labels of that name; it has GOOD, GOOD, BAD"):
        find_label({0: "GOOD", 1: "GOOD", 2: "BAD"}, "GOOD", "some/model")
    assert find_label({0: "GOOD", 1: "GOOD", 2: "BAD"}, "BAD", "some/model") == 2


def test_names_that_are_no_text_are_found_by_how_they_are_written() -> None:
    assert find_label({0: float("nan"), 1: None, 2: 5}, "5", "m") == 2
    with pytest.raises(InputError, match="it has nan, None, 5"):
        find_label({0: float("nan"), 1: None, 2: 5}, "POSITIVE", "m")


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_softmax_is_of_labels_that_exclude_one_another(kind: str) -> None:
    config = BertConfig(num_labels=3, problem_type=kind)
    with pytest.raises(InputError, match=f"reward.transform=softmax: .*problem_type={kind}.*use logit or sigmoid"):
        check_transform("softmax", config, "m")
    check_transform("sigmoid", config, "m")
    check_transform("softmax", BertConfig(num_labels=3), "m")


@pytest.mark.parametrize(
    ("config", "model_max_length", "limit"),
    [
        (BertConfig(max_position_embeddings=512), int(1e30), 512),
        (BertConfig(max_position_embeddings=512), 128, 128),
        (XLNetConfig(), int(1e30), None),
        (MptConfig(max_seq_len=64), int(1e30), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0}), 2048, 64),
    ],
)
def test_the_limit_is_the_smallest_that_is_one(config: object, model_max_length: int, limit: int | None) -> None:
    assert token_limit(config, SimpleNamespace(model_max_length=model_max_length)) == limit
