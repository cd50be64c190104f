"""The benchmark of growth: its verdict by hand, and some of its measures, small, without vLLM and without Ray."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from benchmarks.growth import __main__ as growth
from benchmarks.growth.panels import QUICK, measure
from benchmarks.growth.series import Point, Series, draw, say_verdicts, show


def series(*seconds: float, work: tuple[float, ...] = (1, 2, 4, 8)) -> Series:
    return Series("an update", "batch", "GFLOP", [Point(w, w, s) for w, s in zip(work, seconds, strict=True)])


def test_what_is_linear_or_cheaper_is_not_named() -> None:
    for seconds in ((3, 6, 12, 24), (3, 5, 9, 17), (3, 7, 13.9, 25)):
        assert series(*seconds).excess == []
    assert series(3, 5, 9, 17).growth == pytest.approx([1, 2.5 / 3, 2.25 / 2.5, 2.125 / 2.25])
    assert series(3, 6, 12, 24).verdict == "no faster than the work (at most 1.00 times)"


def test_what_is_quadratic_is_named_with_its_place() -> None:
    found = series(1, 4, 16, 64)
    assert found.growth == [1, 2, 4, 8]
    assert [point.x for point in found.excess] == [2, 4, 8]
    assert found.verdict == "FASTER THAN THE WORK at 2, 4, 8: up to 8.00 times"


def test_an_overhead_at_the_smallest_point_excuses_nothing() -> None:
    found = series(10, 11, 14, 64)  # 10, 5.5, 3.5, 8 a unit: cheaper than the first, and yet it grows
    assert found.growth == pytest.approx([1, 0.55, 3.5 / 5.5, 8 / 3.5])
    assert [point.x for point in found.excess] == [8]


def test_work_that_is_itself_quadratic_may_take_so_long() -> None:
    assert series(1, 4, 16, 64, work=(1, 4, 16, 64)).excess == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let panels be measured in this very process."""
    monkeypatch.setattr(growth, "run", lambda panels, quick: measure(panels, QUICK))


def test_update_and_generation_over_the_batch(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = growth.main(["--quick", "--only", "batch", "--output", str(tmp_path)])
    record: list[dict[str, Any]] = json.loads((tmp_path / "growth.json").read_text())
    assert [(one["quantity"], one["over"]) for one in record] == [
        ("learner's update", "batch"),
        ("generation", "batch"),
    ]
    assert all([point["x"] for point in one["points"]] == [16, 32, 64] for one in record)
    update, generation = ([point["work"] for point in one["points"]] for one in record)
    assert update == pytest.approx([4 * work for work in generation])  # the reference, and an epoch of 3
    assert all(point["seconds"] > 0 for one in record for point in one["points"])
    assert code == int(any(one["grows_faster_at"] for one in record))
    assert capsys.readouterr().out.count("over batch: ") == 2
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_a_panel_that_is_not_there_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--only", "batch,height"])
    assert "there is no height; there are batch, length, size, workers" in capsys.readouterr().err


def test_the_table_marks_what_grows_faster_and_the_plot_is_drawn(tmp_path: Path) -> None:
    console = Console(record=True, width=100, file=(tmp_path / "out.txt").open("w"))
    show([series(1, 2, 4, 16)], console)
    say_verdicts([series(1, 2, 4, 16)], console)
    text = console.export_text()
    assert "2.00 !" in text and "an update over batch: FASTER THAN THE WORK at 8" in text
    draw([series(1, 2, 4, 16), series(1, 2, 3, 4)], tmp_path / "plot.png")
    image = np.round(matplotlib.image.imread(tmp_path / "plot.png")[..., :3] * 255).astype(int)
    assert (image == (0xCC, 0x33, 0x11)).all(-1).sum() > 20  # the line of the limit
