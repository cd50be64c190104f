import io
import json

from rich.console import Console

from benchmarks.compare import picture, report
from benchmarks.compare.arms import ArmRun
from benchmarks.compare.findings import find
from tests.benchmarks.test_summary import MACHINE, ROUNDS, TASK


def test_the_report_in_all_its_forms(tmp_path):
    found, console = find(ROUNDS, [MACHINE, MACHINE], TASK), Console(file=io.StringIO(), width=160)
    report.show(found, [MACHINE, MACHINE], console, tmp_path / "report.md")
    printed, markdown = console.file.getvalue(), (tmp_path / "report.md").read_text()
    for text in (printed, markdown):
        assert "4.00 (47%)" in text  # generation of 8.5 s
        assert "3.25 (2.50 to 4.00)" in text
        assert "2500 (2000 to 3000)" in text
        assert "79%" in text  # the update, of the matrix rate
    assert "| generation " in markdown

    report.write(found, ROUNDS, [MACHINE, MACHINE], {"settings": {}}, tmp_path / "report.json")
    fields = json.loads((tmp_path / "report.json").read_text())
    assert fields["speedups"]["trl"] == {"median": 3.25, "low": 2.5, "high": 4.0}
    assert fields["agreements"]["trl"]["score"]["agrees"] is True
    assert fields["rounds"]["ppo-ray"][1]["steps"][1]["seconds"]["other"] == 0.25
    assert [row["met"] for row in fields["requirements"]] == [True, False, False, False, False, True]

    picture.draw(found, ROUNDS, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_one_round_is_reported_without_a_spread(tmp_path):
    rounds = {arm: runs[:1] for arm, runs in ROUNDS.items()}
    found = find(rounds, [MACHINE], TASK)
    report.show(found, [MACHINE], Console(file=io.StringIO(), width=160), tmp_path / "report.md")
    assert "one seed: unknown" in (tmp_path / "report.md").read_text()
    report.write(found, rounds, [MACHINE], {}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["agreements"]["trl"]["kl"]["spread"] is None


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = ROUNDS["trl"][0]
    run.write(tmp_path / "result.json")
    assert ArmRun.read(tmp_path / "result.json") == run
