import numpy as np
import pytest
import torch

from ppo_ray.models.packing import pack

PROMPTS = [np.array([1, 2]), np.array([9]), np.array([5, 6])]
RESPONSES = [np.array([3, 0, 0]), np.array([8]), np.array([7])]


def test_layout_by_hand() -> None:
    rows = pack([[2, 1], [0]], PROMPTS, RESPONSES)
    assert rows.sequences.tolist() == [0, 1, 2]
    assert rows.input_ids.tolist() == [[5, 6, 9, 0], [1, 2, 3, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert rows.segment_ids.tolist() == [[0, 0, 1, -1], [0, 0, 0, 0]]
    assert rows.target_ids.tolist() == [3, 0, 0, 8, 7]  # a pad token that was sampled counts
    assert rows.input_ids.flatten()[rows.predict_at].tolist() == [2, 3, 0, 9, 6]
    assert rows.response_mask.tolist() == [[True, True, True], [True, False, False], [True, False, False]]


def test_attention_is_causal_within_a_sequence_and_nil_between() -> None:
    mask = pack([[2, 0]], PROMPTS, RESPONSES).attention_mask(packed=True)
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]


def test_padding_is_on_the_right_and_masked_by_length() -> None:
    rows = pack([[0], [1]], PROMPTS, RESPONSES)
    assert rows.attention_mask(packed=False).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert rows.attention_mask(packed=True)[1, 0].any(1).all()  # no token attends to nothing: softmax would be NaN


@pytest.mark.parametrize("empty", ["prompt", "response"])
def test_an_empty_part_is_refused(empty: str) -> None:
    parts = {"prompt": PROMPTS, "response": RESPONSES} | {empty: [*PROMPTS[:2], np.array([], np.int64)]}
    with pytest.raises(ValueError, match="sequence 2 has no prompt or no response token"):
        pack([[0, 2]], parts["prompt"], parts["response"])
    assert torch.equal(pack([[0]], PROMPTS, RESPONSES).target_ids, torch.tensor([3, 0, 0]))
