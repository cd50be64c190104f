"""samples.md: held-out prompts with their responses before and after training."""

import re
from collections.abc import Iterator
from pathlib import Path

from ppo_ray.atomic import write_text
from ppo_ray.run.evaluation import Evaluation
from ppo_ray.run.progress import signed

# Whatever Markdown, GitHub's dialect of it (tables, strikethrough, mathematics, mentions, bare links) or HTML could
# read as structure. Character references are text in all of them, in a table's cell too.
_STRUCTURE = re.compile(r"[\\`*_{}\[\]<>&|#~$!@^=]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def write_samples(path: Path, before: Evaluation, after: Evaluation) -> None:
    """Write the table of samples before and after; generated text can neither break nor format it.

    Where a run that went on shows another number of them (`evaluation.num_samples`), the table has the fewer.

    Raises:
        ValueError: the two evaluations are not of the same prompts.
    """
    write_text(path, "\n".join(_lines(before, after)) + "\n")


def _lines(before: Evaluation, after: Evaluation) -> Iterator[str]:
    yield "# Samples"
    yield ""
    change = f"{signed(before.mean_score)} to {signed(after.mean_score)}"
    yield (
        "One response to each held-out prompt, before and after training. "
        f"Over all {after.num_prompts} of them the mean score went from {change}."
    )
    yield ""
    yield "| | Prompt | Response before | Score before | Response after | Score after |"
    yield "|--:|---|---|--:|---|--:|"
    for number, (old, new) in enumerate(zip(before.samples, after.samples, strict=False), 1):
        if old.prompt != new.prompt:
            raise ValueError(f"sample {number} is of the prompt {old.prompt!r} before and {new.prompt!r} after")
        was, now = (f"{escape(sample.response)} | {signed(sample.score)}" for sample in (old, new))
        yield f"| {number} | {escape(old.prompt)} | {was} | {now} |"


def escape(text: str) -> str:
    """Make text of one line of a Markdown table's cell that shows as it is; invisible characters become their codes."""
    visible = "".join(_visible(character) for character in text)
    return _STRUCTURE.sub(lambda match: f"&#{ord(match[0])};", visible)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵"
    if character.isprintable():
        return character
    # controls, text direction, unpaired surrogates, unusual spaces and ends of lines
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
