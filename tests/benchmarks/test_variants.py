"""The comparison of ways to train one task: its configs load, and its table holds what the runs reached."""

import pytest

from benchmarks.variants import VARIANTS, draw, tabulate
from ppo_ray.config import load_config
from tests.repo.test_layers import ROOT


def make_run(way: str, seed: int, after: float) -> dict[str, object]:
    """Invent a run of six steps."""
    figures = {"score": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "kl": [9.0, 1.0, 2.0, 3.0, 4.0, 5.0], "mismatch": [0.0] * 6}
    return {"way": way, "seed": seed, "before": 0.25, "after": after, **figures}


@pytest.mark.parametrize(("comparison", "way"), [(name, way) for name, ways in VARIANTS.items() for way in ways])
def test_each_way_is_a_config_that_loads(comparison: str, way: str) -> None:
    config, *changes = VARIANTS[comparison][way]
    loaded = load_config(ROOT / config, changes)
    assert loaded.steps == load_config(ROOT / "configs/imdb.yaml").steps
    assert loaded.rollout.batch_size == 32, "responses per step are equal, or the comparison is none"


def test_the_table_has_each_seeds_score_and_the_means_of_the_last_five_steps() -> None:
    table = tabulate([make_run("A", 0, 1.0), make_run("A", 1, 0.75), make_run("B", 0, 0.5)], {"A": 8.04}).splitlines()
    assert table[2:] == [
        "| A | 0.25 -> 1.00, 0.25 -> 0.75 | +0.62 | 3.00 | 8.0 |",
        "| B | 0.25 -> 0.50 | +0.25 | 3.00 |  |",
    ]


def test_the_picture_is_drawn(tmp_path) -> None:
    draw([make_run("A", 0, 1.0), make_run("B", 0, 0.5)], {"A": 8.0}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
