from pathlib import Path

import pyarrow.parquet as pq

from ppo_ray.assets.arithmetic import build_sums, score_exactness, score_form, score_nearness

ANSWERS = ["7", " 7.\n", "7 apples", "It is 9, or 7.", "12", "", "seven", "-7", "13"]


def test_scores_by_hand() -> None:
    right = [7] * len(ANSWERS)
    assert score_exactness(ANSWERS, right) == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert score_form(ANSWERS) == [1, 1, 0, 0, 1, 0, 0, 0, 1]
    assert [round(score, 3) for score in score_nearness(ANSWERS, right)] == [1, 1, 1, 1, 0.167, 0, 0, 1, 0]


def test_every_sum_has_its_answer(tmp_path: Path) -> None:
    build_sums(tmp_path / "sums.parquet")
    rows = pq.read_table(tmp_path / "sums.parquet").to_pylist()
    assert len({row["messages"][0]["content"] for row in rows}) == 100
    for row in rows:
        ((question,), answer) = row["messages"], row["answer"]
        assert question["role"] == "user" and eval(question["content"][8:-1]) == answer


def test_sums_of_two_digits(tmp_path: Path) -> None:
    build_sums(tmp_path / "sums.parquet", digits=2)
    rows = pq.read_table(tmp_path / "sums.parquet").to_pylist()
    assert len({row["messages"][0]["content"] for row in rows}) == 90 * 90
    assert [rows[0]["answer"], rows[-1]["answer"]] == [20, 198]
