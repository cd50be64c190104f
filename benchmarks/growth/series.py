"""Seconds over work: a series for each quantity that is measured, its verdict, its table, its panel in a plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

EPOCHS = 1
"""More would do the same again."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    engine: str
    """`vllm`, or `hf` where it is to start at once."""
    shapes: tuple[str, ...]
    """Of `random_models.SHAPES`, the smallest first; that one is for batch, length and workers too."""
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    """Of responses, tokens."""
    workers: tuple[int, ...]
    length_batch: int = 16
    length_tokens: int = 8192
    """Longer responses are fewer, so that they have so many tokens in all; those are for the learner alone."""
    size_batch: int = 32
    workers_batch: int = 32
    """Trajectories per worker and step."""
    steps: int = 10
    """With so many workers, after those that warm up."""
    round_s: float = 0.5
    """A call is repeated for so long per round, and made once at least."""

    def responses(self, length: int) -> int:
        """Return how many responses of that length there are."""
        return min(self.length_batch, self.length_tokens // length)

    @property
    def generated_lengths(self) -> tuple[int, ...]:
        """Those of which there are `length_batch`: the engine reads its weights once for a token of each."""
        return tuple(length for length in self.lengths if self.responses(length) == self.length_batch)


FULL = Scale(
    "vllm",
    ("16m", "58m", "135m"),
    (16, 32, 64, 128, 256, 512),
    (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    (1, 2, 4),
)
QUICK = Scale("hf", ("tiny", "16m"), (16, 32, 64), (8, 16, 32), (1, 2), steps=3, round_s=0.05)

TOLERANCE = 1.25
"""How many times the seconds that a unit of work took at any smaller point it may take: the rest is called growth."""

_TICKS = 7
"""Labels that fit below a panel."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    x: float
    """What was varied."""
    work: float
    """How much there was to do."""
    seconds: float
    """How long it took: the median of some repetitions."""


@dataclass
class Series:
    """One quantity, as one thing is varied."""

    quantity: str
    """What took the seconds."""
    panel: str
    """What was varied."""
    unit: str
    """Of the work."""
    points: list[Point] = field(default_factory=list)
    """In the order of what was varied, the smallest first."""

    @property
    def growth(self) -> list[float]:
        """Seconds per unit of work at each point, over the fewest at any point before it; 1 at the first.

        Overheads that the smallest points pay make them dear, so they alone would excuse much: the cheapest of all
        smaller points is what counts.
        """
        costs = [point.seconds / point.work for point in self.points]
        return [cost / min(costs[:index] or [cost]) for index, cost in enumerate(costs)]

    @property
    def excess(self) -> list[Point]:
        """The points at which it grew faster than its work."""
        return [point for point, growth in zip(self.points, self.growth, strict=True) if growth > TOLERANCE]

    @property
    def verdict(self) -> str:
        """Say whether it grows faster than its work, and where."""
        if not self.excess:
            return f"no faster than the work (at most {max(self.growth):.2f} times)"
        where = ", ".join(f"{point.x:g}" for point in self.excess)
        return f"FASTER THAN THE WORK at {where}: up to {max(self.growth):.2f} times"


def show(series: Sequence[Series], console: Console) -> None:
    """Print every point of every series."""
    for one in series:
        table = Table(one.panel, f"work, {one.unit}", "seconds", f"s / {one.unit}", "growth", title=one.quantity)
        for point, growth in zip(one.points, one.growth, strict=True):
            mark = " !" if growth > TOLERANCE else ""
            figures = (point.work, point.seconds, point.seconds / point.work)
            table.add_row(f"{point.x:g}", *(f"{figure:.3g}" for figure in figures), f"{growth:.2f}{mark}")
        console.print(table)


def say_verdicts(series: Sequence[Series], console: Console) -> None:
    """Print the verdict of every series."""
    for one in series:
        console.print(f"{one.quantity} over {one.panel}: {one.verdict}", highlight=False, soft_wrap=True)


def draw(series: Sequence[Series], path: Path) -> None:
    """Draw a panel per thing that was varied: each point's growth, as in `Series.growth`, and the limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(one.panel for one in series))
    figure = Figure(figsize=(3.4 * len(panels), 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    quantities = list(dict.fromkeys(one.quantity for one in series))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        shown = [one for one in series if one.panel == panel]
        for one in shown:
            x = [point.x for point in one.points]
            colour = f"C{quantities.index(one.quantity)}"
            axes.plot(x, one.growth, "o-", ms=4, lw=1.5, color=colour, label=one.quantity)
        axes.axhline(TOLERANCE, color="#cc3311", ls="--", lw=2, label=f"limit: {TOLERANCE:g}")
        axes.set(xscale="log", xlabel=f"{panel} (log scale)")
        ticks = sorted({point.x for one in shown for point in one.points})
        ticks = ticks[:: -(-len(ticks) // _TICKS)]
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="lower left")
    figure.axes[0].set_ylim(0, 1.1 * max(TOLERANCE, *(growth for one in series for growth in one.growth)))
    figure.axes[0].set_ylabel("seconds per unit of work,\nover the cheapest smaller point")
    figure.savefig(path, format="png")
