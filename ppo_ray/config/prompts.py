"""The options of data: what prompts are made of, and which prompts are held out."""

import re
from collections.abc import Iterator
from fractions import Fraction
from math import gcd, lcm
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from ppo_ray.config.file import Contradiction
from ppo_ray.config.sections import Revision, Section, Source

LONGEST_PERIOD = 10_000
"""Prompts after which the sources of a mixture must have had exactly their shares."""
SOURCE = "source"
"""The kept column that names the source of a mixture."""


class DataSource(Section):
    """A data set."""

    path: Source | None = None
    """A file (.parquet, .arrow; .jsonl, .ndjson, .json, .csv, .tsv, .txt, also compressed: .gz, .bz2, .zst, .lz4), a
    folder of such files or of `save_to_disk`, or a hub data set name. A folder's files lie in it: its card may name no
    others. A file's texts may take 64 MiB, or 100 times its size, in the folder of temporary files (TMPDIR); Arrow
    files that are not compressed are read where they lie. Required, or `sources`. TRL: `query_dataset`."""
    revision: Revision | None = None
    """Commit, tag or branch of a hub data set; null: its newest commit."""
    subset: str | None = Field(default=None, min_length=1)
    """The part of a hub data set, or of a folder with a card, that `datasets` calls a configuration; null: its default.
    """


class OtherSource(DataSource):
    """A data set that is read as `prompts.path` is, but for what is said here."""

    path: Source
    """As `prompts.path`. Required."""
    split: str | None = None
    """null: as `prompts.split`."""
    column: str | None = None
    """null: as `prompts.column`."""


class MixedSource(OtherSource):
    """One of the data sets of a mixture."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """In what is said of it, and in the kept column `source`. Required."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the prompts, compared with the other weights."""


class EvaluationSet(OtherSource):
    """A data set whose prompts are for evaluation alone."""

    num_prompts: int = Field(default=256, ge=1)
    """How many of its prompts are answered: the same ones each time; all, if it has no more."""


class PromptsConfig(DataSource):
    """What the prompts are made of: texts, or conversations by a chat template."""

    split: str = "train"
    """Split of a folder or hub data set; a single file is taken whole."""
    column: str = "text"
    """Column of the texts, or of the conversations: lists of messages with `role` and `content`, or JSON of such. A
    field of a struct or an object is named by its path, `meta.text`. Each line of a .txt file is a text, in the column
    `text`."""
    sources: Annotated[tuple[MixedSource, ...], Field(strict=False)] = ()
    """A mixture instead of `path`: a list of {name, path, weight, split, column, subset, revision}. After however many
    prompts each has had its share of them, to less than one. Each has its own epochs."""
    keep: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Columns that go with each prompt to the reward and into `trajectories/`, e.g. [answer, source]. `meta.answer` is
    named `answer` from then on. Where there are `sources`, `source` is the name of the prompt's, and each source has
    its mean score in the metrics."""
    chat_template: str = Field(default="auto", min_length=1)
    """Template that makes a prompt of a conversation. auto: the tokenizer's template for messages and where `system` is
    given, and none for plain texts. tokenizer: its template for plain texts too, each as the user's message. none: no
    template. Else the path of a file with a template."""
    template_arguments: dict[str, Any] = Field(default={})
    """Further arguments of the template, e.g. {enable_thinking: false}."""
    system: str | None = None
    """System message put in front of each conversation that has none of its own."""
    min_chars: int = Field(default=0, ge=0)
    """Length that a text must exceed, in characters; shorter texts, and those of exactly this length, are dropped."""
    min_tokens: int | None = Field(default=None, ge=1)
    """Shortest prompt, in tokens, inclusive, where prompts are the beginnings of texts: each gets a length drawn from
    here to max_tokens. A shorter text is used whole. null: prompts are whole texts. TRL: `LengthSampler(min_value)`."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest prompt, in tokens, INCLUSIVE (TRL's `LengthSampler(2, 8)` is half-open and never draws 8)."""
    too_long: Literal["drop", "keep_end", "cut"] | None = None
    """Treatment of a prompt longer than max_tokens. drop: it is left out, and counted. keep_end: its beginning is cut
    off. cut: its end is cut off. null: cut where min_tokens is given, else drop."""
    shuffle: bool = True
    """Order of the prompts. true: a new one each epoch, from the run's seed; false: the order of the data set, every
    time."""

    @property
    def kept_names(self) -> list[str]:
        """The names that the columns of `keep` have from then on: the last parts of theirs."""
        return [name.rpartition(".")[2] for name in self.keep]

    @property
    def kept_sources(self) -> tuple[str, ...]:
        """The names in the kept column `source`: those of a mixture; none where there is no such column."""
        return tuple(source.name for source in self.sources) if SOURCE in self.keep else ()

    @property
    def parts(self) -> tuple[tuple[str, "PromptsConfig"], ...]:
        """The options of each data set by the key of its source: one, or those of the mixture."""
        keep = tuple(name for name in self.keep if name != SOURCE)
        mixed = tuple(
            (f"prompts.sources[{index}]", self.of(source).model_copy(update={"keep": keep}))
            for index, source in enumerate(self.sources)
        )
        return mixed or (("prompts", self),)

    @property
    def place(self) -> str:
        """Where the texts are from, for people."""
        return str(self.path) if not self.sources else ", ".join(source.name for source in self.sources)

    @property
    def quotas(self) -> tuple[int, ...]:
        """The smallest whole numbers in the proportion of the weights of `sources`; (1,) where there are none."""
        weights = [Fraction(repr(source.weight)) for source in self.sources] or [Fraction(1)]
        common = lcm(*(weight.denominator for weight in weights))
        numbers = [int(weight * common) for weight in weights]
        return tuple(number // gcd(*numbers) for number in numbers)

    def of_set(self, name: str, source: EvaluationSet) -> Self:
        """Return these options with the data set of an evaluation; its name stands for that of a mixture's source."""
        if SOURCE not in self.keep or not self.sources:
            return self.of(source)
        options = source.model_dump(exclude={"num_prompts"})
        return self.model_copy(update={"sources": (MixedSource(name=name, **options),)})

    def of(self, source: OtherSource) -> Self:
        """Return these options with another data set."""
        own = {name: getattr(source, name) for name in ("path", "revision", "subset")}
        own |= {name: getattr(source, name) or getattr(self, name) for name in ("split", "column")}
        return self.model_copy(update={**own, "sources": ()})


class EvaluationConfig(Section):
    """Held-out prompts, the same for every run seed, scored before, while and after training."""

    num_prompts: int = Field(default=256, ge=0)
    """Number of prompts that are held out; 0: none, and nothing is evaluated."""
    num_samples: int = Field(default=16, ge=0)
    """Number of held-out prompts that are shown in samples.md."""
    every_steps: int = Field(default=0, ge=0)
    """Steps from one evaluation to the next; its figures are in the metrics, `eval/...`. It changes nothing of the
    training. 0: only before the first step and after the last."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses per held-out prompt."""
    temperature: float | None = Field(default=None, ge=0)
    """Temperature of sampling the responses; 0 takes the likeliest token each time. null: rollout.temperature."""
    pass_score: float | None = None
    """Lowest score of a response that passes. The figure `eval/pass@K` is then the share of prompts of which one of K
    responses passes, for K = 1, 2, 4, ... up to samples_per_prompt. null: there is no such figure."""
    pass_part: str | None = None
    """Part of the reward whose score decides whether a response passes; null: the score."""
    sets: dict[str, EvaluationSet] = Field(default={})
    """Data sets that are evaluated too: {NAME: {path, num_prompts, split, column, subset, revision}}. Their prompts are
    made as those of the training. Their figures are `eval/NAME/...`."""


def prompts_contradictions(prompts: PromptsConfig) -> Iterator[Contradiction]:
    """Yield the contradictions of where prompts are from."""
    if prompts.path is None and not prompts.sources:
        yield Contradiction(("prompts.path", "prompts.sources"), "required, but not given; or give prompts.sources")
    if not prompts.sources:
        return
    for name in ("path", "revision", "subset"):
        if getattr(prompts, name) is not None:
            yield Contradiction(
                (f"prompts.{name}", "prompts.sources"),
                "is for one data set; name it among prompts.sources, or leave these out",
            )
    names = [source.name for source in prompts.sources]
    if len(set(names)) < len(names):
        yield Contradiction(("prompts.sources",), f"{', '.join(names)}: two sources have one name")
    if sum(prompts.quotas) > LONGEST_PERIOD:
        weights = " : ".join(f"{source.weight:g}" for source in prompts.sources)
        yield Contradiction(
            ("prompts.sources",),
            f"the weights {weights} are exact after {sum(prompts.quotas):,} prompts only, and the limit is "
            f"{LONGEST_PERIOD:,}; give fewer digits, or small whole numbers",
        )


def evaluation_contradictions(evaluation: EvaluationConfig) -> Iterator[Contradiction]:
    """Yield the contradictions of evaluation alone."""
    for name in evaluation.sets:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield Contradiction(("evaluation.sets",), f"{name!r} is no name: letters, digits and _ only")
    if evaluation.num_samples > evaluation.num_prompts > 0:
        yield Contradiction(
            ("evaluation.num_samples", "evaluation.num_prompts"),
            f"{evaluation.num_samples} exceeds evaluation.num_prompts={evaluation.num_prompts}",
        )
    if evaluation.pass_part and evaluation.pass_score is None:
        yield Contradiction(("evaluation.pass_part", "evaluation.pass_score"), "says what passes with pass_score only")
    if evaluation.every_steps and not evaluation.num_prompts and not evaluation.sets:
        yield Contradiction(
            ("evaluation.every_steps", "evaluation.num_prompts", "evaluation.sets"),
            "needs held-out prompts; set num_prompts to 1 or more",
        )
