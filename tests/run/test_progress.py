import io
import math

from rich.console import Console

from ppo_ray.run.progress import StepProgress, format_score, step_line

METRICS = {
    "score/mean": 0.514,
    "kl/per_sequence": 1.037,
    "time/generate_s": 3.14,
    "time/score_s": 0.96,
    "time/learn_s": 5.0,
    "time/sync_s": 0.31,
    "time/step_s": 9.44,
}
LINE = "score +0.51  KL 1.04  9.4 s: generate 3.1, score 1.0, learn 5.0, sync 0.3"


def test_step_line():
    assert step_line(METRICS) == LINE
    assert step_line({"score/mean": -0.2}) == "score -0.20"
    assert step_line({"score/mean": math.nan, "time/learn_s": 2.0}) == "score none  seconds: learn 2.0"
    assert step_line({}) == ""


def test_a_log_file_gets_one_plain_line_a_step():
    output = io.StringIO()
    with StepProgress(3, Console(file=output, width=40)) as progress:
        progress.update(0, METRICS)
        progress.update(1, {})
    lines = output.getvalue().splitlines()
    assert lines[0].startswith(f"step 0 (1/3)  {LINE}  left 0:00:0") and lines[1].startswith("step 1 (2/3)  left")
    assert len(lines) == 2 and "\x1b" not in output.getvalue()


def test_a_terminal_gets_a_bar_with_the_figures():
    output = io.StringIO()
    with StepProgress(3, Console(file=output, width=100, force_terminal=True, color_system=None)) as progress:
        assert "first step under way" in output.getvalue()
        progress.update(1, METRICS)
    assert "2/3" in output.getvalue() and "━" in output.getvalue() and LINE in output.getvalue()


def test_signed():
    assert [format_score(score) for score in (1.0, -0.5, None, math.nan)] == ["+1.00", "-0.50", "none", "none"]
