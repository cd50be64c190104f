import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.models.packing import PackedRows, balance, join_prompts, make_microbatches, pack

PROMPTS = [np.array([1, 2]), np.array([9]), np.array([5, 6])]
RESPONSES = [np.array([3, 0, 0]), np.array([8]), np.array([7])]


def test_layout_by_hand() -> None:
    rows = pack([[2, 1], [0]], PROMPTS, RESPONSES)
    assert rows.sequences.tolist() == [0, 1, 2]
    assert rows.packed
    assert rows.input_ids.tolist() == [[5, 6, 9, 0], [1, 2, 3, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert rows.seen_until.tolist() == [[2, 2, 3, 0], [4, 4, 4, 4]]
    assert rows.target_ids.tolist() == [3, 0, 0, 8, 7]  # a pad token that was sampled counts
    assert rows.input_ids.flatten()[rows.predict_at].tolist() == [2, 3, 0, 9, 6]
    assert rows.response_mask.tolist() == [[True, True, True], [True, False, False], [True, False, False]]


def test_attention_is_causal_within_a_sequence_and_nil_between() -> None:
    mask = pack([[2, 0]], PROMPTS, RESPONSES).attention_mask(block_diagonal=True)
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]


def test_prompts_that_begin_alike_share_tokens() -> None:
    prompts = [np.array([1, 2, 3]), np.array([1, 2, 3]), np.array([1, 2, 5, 6]), np.array([1, 9])]
    responses = [np.array([4, 7]), np.array([8]), np.array([4, 4]), np.array([2, 3])]
    rows = pack([[0, 1, 2, 3]], prompts, responses, shortest_shared=2)
    assert rows.packed and rows.longest == 5
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 4, 1, 9, 2]]  # the last prompt shares one token only
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2]]
    assert rows.seen_until.tolist() == [[7, 7, 4, 4, 7, 7, 7, 10, 10, 10]]
    assert rows.predict_at.tolist() == [2, 3, 2, 5, 6, 8, 9]
    assert rows.target_ids.tolist() == [4, 7, 8, 4, 4, 2, 3]
    mask = rows.attention_mask(block_diagonal=True)[0, 0].int().tolist()
    assert mask[3] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert mask[4] == [1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert mask[6] == [1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    assert mask[8] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    whole = pack([[0, 1, 2, 3]], prompts, responses)
    assert whole.input_ids.shape == (1, 15)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=9))
def test_in_a_tree_of_tokens_each_sequence_sees_itself_alone(sizes: list[tuple[int, int, int]]) -> None:
    rng = np.random.default_rng(len(sizes))
    stems = rng.integers(0, 3, (4, 6))
    prompts = [stems[stem, :length] for stem, length, _ in sizes]
    responses = [rng.integers(0, 3, length) for _, _, length in sizes]
    rows = pack([list(range(len(sizes)))], prompts, responses, shortest_shared=1)
    mask, ids = rows.attention_mask(block_diagonal=True)[0, 0], rows.input_ids[0]
    ends = np.cumsum([len(response) for response in responses])
    for prompt, response, end in zip(prompts, responses, ends, strict=True):
        for place in range(len(response)):
            at = rows.predict_at[end - len(response) + place]
            wanted = [*prompt, *response[:place]]
            assert ids[mask[at]].tolist() == wanted
            assert rows.position_ids[0][mask[at]].tolist() == list(range(len(wanted)))


def join(prompts: list[list[int]], sizes: list[int], **limits: int) -> tuple[list[list[int]], list[int]]:
    options = {"hidden_size": 4, "narrowest": 60, "widest": 1000} | limits
    arrays = [np.array(prompt) for prompt in prompts], [np.zeros(size, np.int64) for size in sizes]
    return join_prompts(range(len(prompts)), *arrays, **options)


def test_prompts_are_joined_as_long_as_it_pays() -> None:
    system = list(range(20))
    prompts = [[*system, 1, 2], [7] * 30, [*system, 1], [*system[:15], 3], [*system, 1, 2]]
    # 20 and the answers' tokens but the last; of 0 and 4 the whole prompt, of 2 all but a token; 15 are too few
    assert join(prompts, [3, 3, 3, 3, 3]) == ([[2, 0, 4], [1], [3]], [28, 32, 18])
    assert join(prompts, [3, 3, 3, 3, 3], narrowest=26) == ([[2, 0], [1], [3], [4]], [26, 32, 18, 24])
    assert join(prompts, [3, 3, 3, 3, 3], narrowest=24, hidden_size=10) == ([[2, 0, 4], [1], [3]], [28, 32, 18])
    assert join(prompts, [3, 3, 3, 3, 3], widest=25) == ([[0], [1], [2], [3], [4]], [24, 32, 23, 18, 24])


def test_a_row_counts_its_predictions_where_they_are_more_than_its_tokens() -> None:
    assert join([[5] * 16] * 30, [1] * 30) == ([list(range(30))], [30])  # 16 tokens, 30 predictions


def test_nothing_in_common_leaves_the_sequences_alone_and_in_order() -> None:
    prompts = [[3] * 20, [1] * 20, [2] * 20]
    assert join(prompts, [1, 2, 3]) == ([[0], [1], [2]], [20, 21, 22])


def test_padding_is_on_the_right_and_masked_by_length() -> None:
    rows = pack([[0], [1]], PROMPTS, RESPONSES)
    assert not rows.packed
    assert rows.attention_mask(block_diagonal=False).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    # no token attends to nothing: its softmax would be NaN
    assert rows.attention_mask(block_diagonal=True)[1, 0].any(1).all()


def test_a_pass_over_no_sequence_predicts_nothing() -> None:
    rows = PackedRows.empty()
    assert not rows.packed
    assert rows.attention_mask(block_diagonal=True).tolist() == [[[[True]]]]
    assert (len(rows.sequences), len(rows.predict_at), len(rows.target_ids)) == (0, 0, 0)
    assert rows.response_mask.shape == (0, 1)


@pytest.mark.parametrize("empty", ["prompt", "response"])
def test_an_empty_part_is_refused(empty: str) -> None:
    parts = {"prompt": PROMPTS, "response": RESPONSES} | {empty: [*PROMPTS[:2], np.array([], np.int64)]}
    with pytest.raises(ValueError, match="sequence 2 has no prompt or no response token"):
        pack([[0, 2]], parts["prompt"], parts["response"])
    assert torch.equal(pack([[0]], PROMPTS, RESPONSES).target_ids, torch.tensor([3, 0, 0]))


def test_one_sequence_a_row_by_hand() -> None:
    # longest first: 7, 5, 5, 2; 2 rows of 7 fit into 15, then 2 rows of 5
    assert make_microbatches([5, 2, 7, 5], budget=15) == [[[2], [0]], [[3], [1]]]


def test_packed_rows_by_hand() -> None:
    # rows of 10: 7 + 2, 5 + 5; both fit into 20
    assert make_microbatches([5, 2, 7, 5], budget=20, row_width=10) == [[[0, 3], [2, 1]]]


def test_rows_are_as_wide_as_leaves_the_least_padding() -> None:
    # rows of 8 would hold 7 | 5 | 5, 21 tokens for 17; of 10, 7 | 5 + 5, 20 for 17
    assert make_microbatches([7, 5, 5], budget=100, row_width=8) == [[[1, 2], [0]]]


def test_a_sequence_longer_than_everything_goes_alone() -> None:
    assert make_microbatches([3, 50, 3], budget=8) == [[[1]], [[0], [2]]]
    # ... and, packed, makes the rows as wide as itself
    assert make_microbatches([3, 50, 3], budget=8, row_width=6) == [[[1]], [[0, 2]]]


def test_a_row_as_wide_as_the_budget_is_a_micro_batch() -> None:
    # 7 leaves 3, in which 3 finds room; 5 + 5; what is longer than the budget goes alone
    assert make_microbatches([3, 5, 7, 12, 5, 2], budget=10, row_width=10) == [[[3]], [[2, 0]], [[1, 4]], [[5]]]


def test_bounds_are_of_one_row_without_anything_in_common() -> None:
    bounds = pack([[2, 1, 0]], PROMPTS, RESPONSES).bounds
    assert bounds is not None and bounds[0, 0, :, 0].tolist() == [0, 2, 3, 7] and bounds.shape[3] == 4
    assert pack([[2, 1], [0]], PROMPTS, RESPONSES).bounds is None
    alike = [np.array([1, 2, 3]), np.array([1, 2, 4])]
    assert pack([[0, 1]], alike, RESPONSES, shortest_shared=2).bounds is None
    assert pack([[0, 1]], alike, RESPONSES, shortest_shared=3).bounds is not None


def test_places_are_those_of_the_mask() -> None:
    rows = pack([[2, 1], [0]], PROMPTS, RESPONSES)
    assert rows.places.tolist() == rows.response_mask.flatten().nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200), st.sampled_from([0, 16, 64]))
def test_every_sequence_once_within_the_budget(lengths: list[int], budget: int, row_width: int) -> None:
    batches = make_microbatches(lengths, budget, row_width)
    assert sorted(index for batch in batches for row in batch for index in row) == list(range(len(lengths)))
    for batch in batches:
        widths = [sum(lengths[index] for index in row) for row in batch]
        assert len(batch) == 1 or len(batch) * max(widths) <= budget
        assert max(widths) <= 1.25 * max(row_width, *lengths) if row_width else max(lengths)
        assert row_width or all(len(row) == 1 for row in batch)


def test_packing_wastes_little_where_length_sorting_wastes_much() -> None:
    lengths = [2 + index % 23 for index in range(128)]
    padded, packed = (
        sum(len(batch) * max(sum(lengths[index] for index in row) for row in batch) for batch in batches)
        for batches in (make_microbatches(lengths, 10**6), make_microbatches(lengths, 10**6, 64))
    )
    assert padded > 1.6 * sum(lengths)
    assert packed < 1.02 * sum(lengths)


@pytest.mark.parametrize(("lengths", "budget"), [([1, 0], 10), ([1], 0)])
def test_nothing_below_one_token(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_microbatches(lengths, budget)


def test_shares_by_hand() -> None:
    # 8 | 7; 5 to the second (12), 4 to the first (12), 3 to the first (tie: lower number), 1 to the second
    assert balance([3, 8, 5, 1, 7, 4], 2) == [[0, 1, 5], [2, 3, 4]]
    assert balance([2, 9], 3) == [[1], [0], []]


@given(st.lists(st.integers(1, 500), max_size=80), st.integers(1, 9))
def test_shares_are_balanced_by_tokens(lengths: list[int], num_shares: int) -> None:
    shares = balance(lengths, num_shares)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)  # the last given was given to who had least
    best = max([sum(lengths) / num_shares, *lengths])
    assert max(loads) <= 4 / 3 * best + max(lengths, default=0) / 3
