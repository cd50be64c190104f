import contextlib
import io
import math
import os
import pty
import re
import subprocess
import sys
import termios

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


PROGRAM = """
from rich.console import Console
from ppo_ray.events import say
from ppo_ray.run.evaluation import Evaluation, Sample
from ppo_ray.run.progress import StepProgress
from ppo_ray.run.summary import print_evaluation
hostile = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x1bcfilm"
console = Console()
with StepProgress(8, console) as progress:
    for step in range(8):
        with progress.show_phase("generating"):
            progress.update(step, {"score/mean": step / 7, "kl/per_sequence": 1.0 - step / 7, "time/step_s": 1.0})
        if step == 3:
            say(console, f"rollout-0 was lost: {hostile}")
print_evaluation(console, Evaluation(0.5, 0.0, 1, 0, (Sample(hostile, hostile, 0.5),)))
"""


def run_on_terminal(program: str) -> str:
    """Run a program whose output is a pseudo terminal of 100 columns; return all that it wrote."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (40, 100))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "COLUMNS", "CI")}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment) as process:
        os.close(side)
        written = b""
        with contextlib.suppress(OSError):  # which a terminal raises at its end
            while part := os.read(main, 65536):
                written += part
        assert process.wait(60) == 0, written.decode(errors="replace")
    os.close(main)
    return written.decode()


def test_a_real_terminal_shows_curves_and_what_models_write_does_nothing_to_it():
    written = run_on_terminal(PROGRAM)
    assert "score    +1.00  ▁▂▃▄▅▆▇█" in written and "KL        0.00  █▇▆▅▄▃▂▁" in written
    assert "8/8" in written and re.search(r"now: generating, \d+ s", written) and "step 3 (4/8)" not in written
    for control in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\x1bc"):
        assert control not in written, repr(control)
    assert re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written).count("\x1b") == 0  # but for rich's own
    assert r"rollout-0 was lost: \x1b]0;owned\x07\x1b[2J\x9b31m\x1bcfilm" in written and "owned" in written[-2000:]


def test_a_program_without_a_terminal_writes_plain_lines():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, timeout=120)
    written = result.stdout.decode()
    steps = [line for line in written.splitlines() if line.startswith("step ")]
    assert [line.partition("  ")[0] for line in steps] == [f"step {step} ({step + 1}/8)" for step in range(8)]
    assert not {"\x1b", "\x07", "\x9b"} & set(written) and not set("▁▂▃▄▅▆▇█") & set(written)
    assert r"\x1b]0;owned\x07" in written
