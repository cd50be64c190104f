"""The report of a run: what it says, and that no text of a run can change it."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ppo_ray.errors import InputError
from ppo_ray.run.record import PANELS, RunRecord
from ppo_ray.run.report import make_report, write_report
from tests.view.runs import append_step, make_run, measure

HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "{{ record }} {% raw %}",
    "\x00\x1b[31mred\x1b[0m",
    "\u202eright to left",
    "&lt;b&gt;",
    "x" * 1_000_000,
    '=HYPERLINK("http://example.org")',
]


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.text += " " if tag in ("td", "dd", "span", "p", "h3") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", 4)


def test_it_says_what_was_trained_and_what_went_wrong(run: Path) -> None:
    text = " ".join(Page(make_report(RunRecord.read(run))).text.split())
    assert "4 of 5 steps" in text and "model no/where" in text
    assert "0 → 1.5 mean score of the batch" in text
    assert "policy/clip_fraction left its healthy range (at most 0.3) in 1 of 4 steps, last at step 0" in text
    assert "lower ppo.learning_rate or ppo.epochs" in text
    assert "worker replaced rollout-0 was lost" in text
    assert "learner-0 – 2 – 5 – 7.5" in text and "rollout-1 node-1 0.5 – – – –" in text
    assert "memory/rollout_gib" not in text  # the log of this run has no such figure
    assert "steps 5 100" in text  # an option, its value, its default
    assert "response 3 6" in text and "The best scored, step 3" in text  # the best of the newest step


def test_it_needs_no_network_and_no_script(run: Path) -> None:
    html = make_report(RunRecord.read(run))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    links = {name for name, value in page.attributes if value and re.match(r"(?:https?:)?//", value)}
    assert links <= {"xmlns", "xmlns:xlink"}  # the names of SVG's own words
    assert "default-src 'none'" in html
    assert page.tags.count("svg") == page.tags.count("figure") > 5


def test_its_size_is_bounded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, {0: ["<" * 200_000] * 8})
    line = (run / "metrics.jsonl").read_text().splitlines()[0]
    with (run / "metrics.jsonl").open("a") as log:
        log.writelines(line.replace('"step": 0', f'"step": {step}') + "\n" for step in range(1, 5000))
        log.writelines('{"event": "resumed", "step": 1, "message": "' + "m" * 3000 + '"}\n' for _ in range(500))
    html = make_report(RunRecord.read(run))
    assert len(html.encode()) < 5_000_000
    assert "200,000 characters" in html


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", 1, {0: HOSTILE})
    (run / "evaluation_after.json").write_text(
        (run / "evaluation_before.json").read_text().replace('"resp"', '"<i>onse"')
    )
    make_run(tmp_path / "run", 1)
    shutil.copy(run / "evaluation_after.json", tmp_path / "run" / "evaluation_after.json")
    harmless = Page(make_report(RunRecord.read(tmp_path / "run")))
    page = Page(make_report(RunRecord.read(run)))
    for tag in (*"abip", "img", "script", "table", "tr", "td", "h3", "figure"):  # within a chart seconds decide
        assert page.tags.count(tag) == harmless.tags.count(tag)
    for text in (
        HOSTILE[0],
        HOSTILE[1],
        HOSTILE[2],
        HOSTILE[5],
        "<i>onse",
        "<b>run",
        r"\x00\x1b[31mred",
        r"\u202eright",
    ):
        assert text in page.text
    assert not set("\x00\x1b\u202e") & set(page.text)


def test_a_run_under_way_and_one_without_anything_have_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0)
    assert "0 of 5 steps" in make_report(RunRecord.read(run))
    append_step(run, 0)
    (run / "trajectories" / "step-00001.parquet").write_bytes(b"PAR1")  # being written
    text = Page(make_report(RunRecord.read(run))).text
    assert "1 of 5 steps" in text and "step-00001.parquet cannot be read" in text


def test_it_is_written_whole_or_refused(run: Path, tmp_path: Path) -> None:
    write_report(RunRecord.read(run), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(RunRecord.read(run), tmp_path / "file" / "report.html")


def test_what_a_chart_shows_is_what_the_documents_say() -> None:
    documents = " ".join((Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text().split())
    for panel in PANELS:
        rows = [line for line in documents.split("| `") if f"{panel.names[0]}`" in f"{line.split(' | ')[0]}"]
        assert rows or panel.names[0].startswith("time/"), panel.title
        assert panel.about in documents, panel.title
    assert measure(0).keys() & {panel.names[0] for panel in PANELS}
