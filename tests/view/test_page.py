"""The page in a real browser: open, filter, sort, colour, compare, follow; and texts that would rather be scripts.

It needs playwright and a Chromium: `apt-get install chromium`, or PPO_RAY_CHROMIUM=/path/to/chromium.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.view.runs import ROWS, append_step, make_run, make_step

CHROMIUM = os.environ.get("PPO_RAY_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or set PPO_RAY_CHROMIUM"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\x00\x1b[31mANSI\x1b[0m\x07",
    "\u202egnihtemos\u202c and \u200bnothing",
    "a" * 1_000_000,
    "</textarea></style><svg onload=document.title='owned'>",
    "javascript:document.title='owned'",
    "\u0645\u0631\u062d\u0628\u0627",
]
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=WAIT_MS)  # of a busy machine
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Shown:
    """A page of `ppo-ray view`, with what its console said."""

    def __init__(self, browser: Any, *runs: Path) -> None:
        command = [sys.executable, "-m", "ppo_ray", "view", *map(str, runs)]
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.server.stderr
        line = self.server.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/#token=\S+", line)
        assert found, line
        self.address = found[0]
        self.context = browser.new_context(viewport={"width": 1440, "height": 900}, locale="en-US")
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(self.address)

    def close(self) -> None:
        self.context.close()
        self.server.terminate()
        self.server.wait(30)

    def go(self, page: str) -> None:
        self.page.evaluate("hash => location.hash = hash", f"#/{page}")

    def rows(self) -> list[list[str]]:
        script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
        return list(self.page.locator(".list .samples tbody tr").evaluate_all(script))

    def wait_for_count(self, text: str) -> None:
        playwright.expect(self.page.locator(".count b")).to_have_text(text, timeout=WAIT_MS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "first", 3), make_run(folder / "second", 2)]


@pytest.fixture
def shown(browser: Any, runs: list[Path]) -> Iterator[Shown]:
    shown = Shown(browser, *runs)
    yield shown
    shown.close()
    assert shown.said == []
    origin, _, token = shown.address.partition("/#token=")
    assert all(url.startswith(origin) for url in shown.asked)  # no other server is asked for anything
    assert not any(token in url.partition("#")[0] for url in shown.asked)


def expect_texts(locator: Any, *texts: str) -> None:
    for text in texts:
        playwright.expect(locator).to_contain_text(text, timeout=WAIT_MS)


def test_two_runs_are_compared(shown: Shown) -> None:
    page = shown.page
    expect_texts(page.locator(".standing"), "first", "second", "3 / 5", "2 / 5")
    expect_texts(page.locator(".health"), "policy/clip_fraction", "at most 0.3", "lower ppo.learning_rate")
    assert page.locator(".chart canvas").count() == page.locator(".chart").count() > 5
    assert "token" not in page.url
    score = page.locator('.chart[data-names^="score/mean"] .values span')
    playwright.expect(score).to_have_count(4)  # two runs, each with its batches and its held-out prompts
    page.get_by_role("button", name="second").click()
    playwright.expect(score).to_have_count(2)
    expect_texts(page.locator("main"), "options are not the defaults", "rollout-0 was lost")
    page.get_by_label("against").select_option("responses")
    page.get_by_label("smoothed over").select_option("1")
    playwright.expect(score.first).to_have_text("1")


def test_samples_are_filtered_sorted_and_searched(shown: Shown) -> None:
    page = shown.page
    shown.go("samples?run=0")
    shown.wait_for_count(str(3 * ROWS))
    page.get_by_role("button", name="KL", exact=True).click()
    playwright.expect(page.locator("th[aria-sort=descending]")).to_have_text("KL↓")
    playwright.expect(page.locator(".list .samples tbody tr").first).to_contain_text("response 2 6")
    page.get_by_label("min of score").fill("5")
    shown.wait_for_count("6")
    page.get_by_label("worker").select_option("rollout-1")
    shown.wait_for_count("3")
    assert [row[-1] for row in shown.rows()] == ["response 2 5", "response 1 5", "response 0 5"]
    page.get_by_role("button", name="clear").click()
    shown.wait_for_count(str(3 * ROWS))
    page.keyboard.press("/")
    page.keyboard.type("RESPONSE 1 [23]")
    shown.wait_for_count("0")
    page.get_by_label("pattern").check()
    shown.wait_for_count("2")
    page.locator("#search").fill("(")
    expect_texts(page.locator(".count"), "no regular expression")
    shown.said.clear()  # the browser says that an answer was a 400


def test_a_sample_is_opened_and_coloured(shown: Shown) -> None:
    page = shown.page
    shown.go("samples?run=0")
    shown.wait_for_count(str(3 * ROWS))
    page.get_by_text("response 2 3", exact=True).click()
    tokens = page.locator(".drawer .token")
    playwright.expect(tokens).to_have_count(4)
    expect_texts(page.locator(".drawer"), "prompt 3", "response 2 3", str(2**60 + 3), "The same prompt: 3 responses")
    page.locator(".drawer").get_by_label("colour by").select_option("advantage")
    assert "color-mix" in (tokens.first.get_attribute("style") or "") and "--warm" in (
        tokens.first.get_attribute("style") or ""
    )
    page.locator(".drawer").get_by_label("colour by").select_option("")
    assert "color-mix" not in (tokens.first.get_attribute("style") or "")
    tokens.nth(1).hover()
    expect_texts(page.locator("#tip"), "token 2 of 4, id 1", "advantage0.25", "KL2", "log-probability0.25", "value0.25")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect_texts(page.locator("#tip"), "token 2 of 4")
    address = page.url
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".drawer")).to_be_hidden()
    page.goto(address)  # an address leads to the same sample
    playwright.expect(page.locator(".drawer .token")).to_have_count(4)
    page.locator(".drawer .alike").get_by_text("response 0 3").click()
    expect_texts(page.locator(".drawer h2"), "Step 0, response 3")


def test_a_conversation_is_shown_as_chat(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    messages = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Why?\nReally."}]
    column = pa.array([json.dumps(messages)] * ROWS)
    pq.write_table(make_step(0).append_column("messages", column), run / "trajectories" / "step-00000.parquet")
    shown = Shown(browser, run)
    try:
        shown.go("samples?run=0&open=0.2")
        expect_texts(shown.page.locator(".drawer"), "Conversation", "response 0 2")
        expect_texts(shown.page.locator(".drawer .chat"), "system", "Be <b>brief</b>.", "user", "Why?")
        playwright.expect(shown.page.locator(".drawer .chat > *")).to_have_count(2)
        assert "Why?" in shown.rows()[2][-2]  # the table has the question
    finally:
        shown.close()
    assert shown.said == []


def test_two_steps_are_shown_side_by_side(shown: Shown) -> None:
    shown.go("sides?a=0.0&b=0.2")
    pairs = shown.page.locator(".pair")
    playwright.expect(pairs).to_have_count(ROWS)
    expect_texts(shown.page.locator("main"), f"{ROWS} prompts are in both steps")
    expect_texts(pairs.first, "prompt 6", "response 0 6", "response 2 6")
    pairs.first.get_by_role("button", name="token by token").first.click()
    playwright.expect(pairs.first.locator(".token")).to_have_count(7)


def test_distributions_and_the_system(shown: Shown) -> None:
    shown.go("spreads?of=tokens")
    expect_texts(shown.page.locator("main"), "length over the steps", "Step 2: 8 values", "Best scored", "Worst scored")
    playwright.expect(shown.page.locator(".ridge").first).to_be_visible()
    shown.go("system?step=1")
    expect_texts(shown.page.locator("main"), "generation", "learner: optimizer steps", "rollout-1")
    playwright.expect(shown.page.locator(".lane")).to_have_count(
        8
    )  # of two runs: two parts, one of them of two workers
    actors = shown.page.locator(".actors").first
    expect_texts(actors, "rollout-1", "node-1", "6.50 GiB", "4 GiB", "0.5 s")
    expect_texts(shown.page.locator("main"), "Resident memory, GiB", "GPU memory, reserved, GiB")
    playwright.expect(shown.page.locator(".chart canvas")).to_have_count(4)


def test_light_and_dark(shown: Shown) -> None:
    page = shown.page
    expect_texts(page.locator(".standing"), "first")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.keyboard.press("t")
    assert page.evaluate(ground) != before
    page.reload()
    expect_texts(page.locator(".standing"), "first")
    assert page.evaluate(ground) != before


def test_a_browser_under_the_locale_c_is_served_too(shown: Shown) -> None:
    page = shown.context.new_page()
    page.add_init_script("Object.defineProperty(navigator, 'language', { value: 'en-US@posix', configurable: true })")
    page.goto(shown.address)
    expect_texts(page.locator(".standing"), "first")
    playwright.expect(page.locator(".chart canvas").first).to_be_visible()


def test_a_run_under_way_is_followed(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    shown = Shown(browser, run)
    try:
        expect_texts(shown.page.locator(".standing"), "1 / 5", "under way")
        append_step(run, 1)
        expect_texts(shown.page.locator(".standing"), "2 / 5")
        shown.go("samples")
        shown.wait_for_count(str(2 * ROWS))
        (run / "trajectories" / "step-00002.parquet").write_bytes(b"PAR1 being written")
        append_step(run, 3)
        shown.wait_for_count(str(3 * ROWS))
        expect_texts(shown.page.locator(".count"), "1 file is left out")
    finally:
        shown.close()
    assert shown.said == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "<b>run", 1, {0: HOSTILE})
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"event": "<img src=x onerror=alert(1)>", "step": 0, "message": "<script>alert(1)</script>"}\n')
    before = (run / "evaluation_before.json").read_text()
    for name in ("before", "after"):
        (run / f"evaluation_{name}.json").write_text(before.replace('"resp"', '"<iframe src=/>"'))
    return run


def test_hostile_texts_are_shown_as_texts(browser: Any, hostile: Path) -> None:
    shown = Shown(browser, hostile)
    page = shown.page
    page.on("dialog", lambda dialog: shown.said.append(f"dialog: {dialog.message}"))
    try:
        expect_texts(page.locator("main"), "<script>alert(1)</script>", "<iframe src=/>", "<b>run")
        shown.go("samples?run=0&sort=score")
        shown.wait_for_count(str(ROWS))
        texts = [row[-1] for row in shown.rows()]
        assert texts[:2] == HOSTILE[:2] and texts[5:7] == HOSTILE[5:7]
        assert texts[2] == "␀␛[31mANSI␛[0m␇"
        assert texts[3] == "U+202EgnihtemosU+202C and U+200Bnothing"
        assert len(texts[4]) == 400
        for row in range(ROWS):
            shown.go(f"samples?run=0&open=0.{row}")
            expect_texts(page.locator(".drawer h2"), f"Step 0, response {row}")
            assert len(page.locator(".drawer .response").inner_text()) < 30_000  # the rest when it is asked for
        shown.go("sides?a=0.0&b=0.0")
        expect_texts(page.locator("main"), *HOSTILE[:2])
        shown.go("spreads")
        expect_texts(page.locator("main"), "Best scored", HOSTILE[0])
        created = page.evaluate(
            "[...document.querySelectorAll('script, iframe, img, object, embed')].map(e => e.outerHTML)"
        )
        assert len(created) == 2  # the page's own script and sign
        assert "owned" not in page.title()
    finally:
        shown.close()
    assert shown.said == []


def test_a_page_of_another_site_reads_nothing(browser: Any, runs: list[Path]) -> None:
    shown = Shown(browser, runs[0])
    try:
        expect_texts(shown.page.locator(".standing"), "first")
        other = shown.context.new_page()
        other.goto("data:text/html,<title>other</title>")
        origin = shown.address.partition("/#")[0]
        script = "url => fetch(url).then(answer => answer.text(), error => 'refused')"
        assert other.evaluate(script, f"{origin}/api/runs") == "refused"
        other.set_content(f"<iframe src='{origin}/'></iframe>")
        assert other.locator("iframe").content_frame.locator("#main").count() == 0
    finally:
        shown.close()
