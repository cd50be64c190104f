import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from ppo_ray.run.curves import draw_curves
from ppo_ray.run.evaluation import Evaluation

BEFORE, AFTER = (Evaluation(mean, 1.0, 64, 0, (), {"eval/score_error": 0.2}) for mean in (0.1, 0.9))
HISTORY = [
    {
        "step": step,
        "score/mean": 0.1 * step,
        "kl/per_sequence": 0.2 * step,
        "policy/approx_kl": 0.01 * step,
        "policy/clip_fraction": 0.1,
    }
    for step in range(6)
]
BLUE, RED, GREEN, PURPLE, ORANGE = (
    (0x2A, 0x6F, 0x97),
    (0xD1, 0x49, 0x5B),
    (0x3A, 0x7D, 0x44),
    (0x8E, 0x5E, 0xA2),
    (0xC7, 0x7D, 0x0A),
)


def num_pixels(path, colour):
    image = np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)
    return int((image == colour).all(-1).sum())


def test_curves_and_markers_are_drawn(tmp_path):
    draw_curves(tmp_path / "curves.png", HISTORY, BEFORE, AFTER)
    colours = (BLUE, RED, GREEN, PURPLE, ORANGE)
    assert all(num_pixels(tmp_path / "curves.png", colour) > 200 for colour in colours)
    without_target = num_pixels(tmp_path / "curves.png", GREEN)
    draw_curves(tmp_path / "curves.png", HISTORY, None, None, "imdb: policy, seed 0", 6.0)
    assert num_pixels(tmp_path / "curves.png", GREEN) > without_target + 200
    assert num_pixels(tmp_path / "curves.png", RED) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_every_set_has_a_line_of_its_own(tmp_path):
    orange = (0xE0, 0x9F, 0x3E)
    after = Evaluation(0.9, 1.0, 64, 0, (), {"eval/score_mean": 0.9, "eval/hard/score_mean": 0.4})
    history = [{**step, "eval/hard/score_mean": 0.1} if step["step"] == 2 else step for step in HISTORY]
    draw_curves(tmp_path / "curves.png", history, None, after)
    assert all(num_pixels(tmp_path / "curves.png", colour) > 50 for colour in (RED, orange))
    alone = Evaluation(0.4, 1.0, 64, 0, (), {"eval/hard/score_mean": 0.4})  # nothing else is held out
    draw_curves(tmp_path / "curves.png", history, None, alone)
    assert num_pixels(tmp_path / "curves.png", orange) > 50 and num_pixels(tmp_path / "curves.png", RED) == 0


@pytest.mark.parametrize("history", [[], HISTORY[:1], [{"step": 0}, {"step": 1, "score/mean": math.nan}]])
def test_little_to_draw_is_no_error(history, tmp_path):
    draw_curves(tmp_path / "curves.png", history, BEFORE, None)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_loaded_only_when_something_is_drawn():
    check = "import ppo_ray.run.curves, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_rate_of_passes_gets_a_panel_of_its_own(tmp_path):
    draw_curves(tmp_path / "curves.png", HISTORY, BEFORE, AFTER)
    height = matplotlib.image.imread(tmp_path / "curves.png").shape[0]
    draw_curves(tmp_path / "curves.png", [{**line, "eval/pass@1": 0.5} for line in HISTORY], BEFORE, AFTER)
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[0] > height
