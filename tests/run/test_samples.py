import html

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ppo_ray.run.evaluation import Evaluation, Sample
from ppo_ray.run.summary import escape, write_samples


def evaluation(*samples, mean=0.0):
    return Evaluation(mean, 1.0, 256, 0, tuple(Sample(*sample) for sample in samples))


def cells(path):
    """The table's text as a Markdown reader shows it, by row."""
    tokens = (
        MarkdownIt("commonmark", {"html": True, "linkify": False})
        .enable(["table", "strikethrough"])
        .parse(path.read_text())
    )
    rows, row = [], None
    for token in tokens:
        if token.type == "tr_open":
            rows.append(row := [])
        elif token.type == "inline" and row is not None:
            assert all(child.type in ("text", "text_special") for child in token.children), token.content
            row.append("".join(child.content for child in token.children))
    return rows[1:]


def test_table(tmp_path):
    path = tmp_path / "samples.md"
    before = evaluation(("I saw", " a bad film", -1.25), ("It", " is", None), mean=-0.125)
    after = evaluation(("I saw", " a great film", 2.0), ("It", " was", 0.5), mean=1.5)
    write_samples(path, before, after)
    assert cells(path) == [
        ["1", "I saw", "a bad film", "-1.25", "a great film", "+2.00"],
        ["2", "It", "is", "none", "was", "+0.50"],
    ]
    assert "from -0.12 to +1.50" in path.read_text()


HOSTILE = (
    "|a|b|\n\n# h\r\n`c` ``` <script>alert(1)</script> **b** [x](http://y.z) \\| &lt; www.a.b ~~s~~ $m$ "
    "\x1b[2J\x00 \u202e\u2028"
)


def test_hostile_text_stays_one_cell_and_shows_as_it_is(tmp_path):
    path = tmp_path / "samples.md"
    write_samples(path, evaluation((HOSTILE, HOSTILE, 1.0)), evaluation((HOSTILE, HOSTILE, 1.0)))
    shown = (
        "|a|b|↵↵# h\\x0d↵`c` ``` <script>alert(1)</script> **b** [x](http://y.z) \\| &lt; www.a.b ~~s~~ $m$ "
        "\\x1b[2J\\x00 \\u202e\\u2028"
    )
    assert cells(path) == [["1", shown, shown, "+1.00", shown, "+1.00"]]
    assert not any(part in path.read_text() for part in ("<script", "\x1b", "\x00", "http://", "www.", "\u202e"))


@given(st.text())
def test_any_text_is_one_line_that_reads_back(text):
    escaped = escape(text)
    assert not set(escaped) & set("|\n\r`<>\\*_[]") and escaped.isprintable()
    if text.isprintable():
        assert html.unescape(escaped) == text


def test_a_run_that_went_on_may_show_fewer(tmp_path):
    two = evaluation(("a", "b", 1.0), ("c", "d", 2.0))
    for before, after in ((two, evaluation(("a", "e", 3.0))), (evaluation(("a", "e", 3.0)), two)):
        write_samples(tmp_path / "samples.md", before, after)
        assert [row[1] for row in cells(tmp_path / "samples.md")] == ["a"]


def test_other_prompts_are_shown_both(tmp_path):
    write_samples(tmp_path / "samples.md", evaluation(("a", "b", 1.0)), evaluation(("c", "b", 1.0)))
    assert [row[1] for row in cells(tmp_path / "samples.md")] == ["before: a↵after: c"]
