import io
import math

from rich.console import Console

from ppo_ray.run.progress import StepProgress, draw_spark, format_score, step_line

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


def test_a_terminal_shows_curves_and_what_is_under_way():
    output = io.StringIO()
    console = Console(file=output, width=40, force_terminal=True, color_system=None)
    progress = StepProgress(9, console, 3)
    progress.show_history({"score/mean": float(step), "kl/per_sequence": math.nan} for step in range(3))
    with progress:
        with progress.show_phase("generating"):
            progress.update(3, {"score/mean": 7.0, "kl/per_sequence": 0.5})
        assert "score    +7.00  ▁▂▃█" in output.getvalue() and "KL        0.50     ▁" in output.getvalue()
        assert "now: generating, 0 s" in output.getvalue()
        console.print("a worker's line")
        progress.update(4, {"score/mean": math.nan})
    assert "a worker's line\n" in output.getvalue()
    last = output.getvalue().rpartition("steps done")[2]
    assert "score     none  ▁▂▃█ " in last and "now:" not in last
    assert output.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_log_file_gets_no_curves_and_no_phases():
    output = io.StringIO()
    with StepProgress(3, Console(file=output, width=40)) as progress:
        progress.show_history([METRICS])
        with progress.show_phase("generating"):
            progress.update(0, {"score/mean": 1.0})
    assert len(output.getvalue().splitlines()) == 1 and "generating" not in output.getvalue()


def test_bars_go_from_the_lowest_value_to_the_highest():
    assert draw_spark([0, 7, 3.5, -math.inf, 1]) == "▁█▅ ▂"
    assert draw_spark([2, 2]) == "▁▁" and draw_spark([math.nan]) == " " and draw_spark([]) == ""


def test_signed():
    assert [format_score(score) for score in (1.0, -0.5, None, math.nan)] == ["+1.00", "-0.50", "none", "none"]
