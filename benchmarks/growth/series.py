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
    size_batch: int = 32
    workers_batch: int = 32
    """Trajectories a worker and step."""
    steps: int = 10
    """With so many workers, after those that warm up."""
    round_s: float = 0.5
    """A call is repeated for so long a round, and made once at least."""


FULL = Scale(
    "vllm",
    ("16m", "58m", "135m"),
    (16, 32, 64, 128, 256, 512),
    (8, 16, 32, 64, 128, 256, 512),
    (1, 2, 4),
)
QUICK = Scale("hf", ("tiny", "16m"), (16, 32, 64), (8, 16, 32), (1, 2), steps=3, round_s=0.05)

TOLERANCE = 1.25
"""How many times the seconds that a unit of work took at any smaller point it may take: the rest is called growth."""


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
        """Seconds a unit of work at each point, over the fewest at any point before it; 1 at the first.

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
    """Draw a panel a series, both axes logarithmic: what was measured, and what the work alone would make of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 3 * rows), layout="constrained", squeeze=False
    )
    for one, axis in zip(series, axes.flat, strict=False):
        x = [point.x for point in one.points]
        cheapest = min(one.points, key=lambda point: point.seconds / point.work)
        work = [cheapest.seconds * point.work / cheapest.work for point in one.points]
        axis.plot(x, [point.seconds for point in one.points], "o-", label="measured")
        axis.plot(x, work, "--", color="grey", label="as the work")
        axis.set(xscale="log", yscale="log", xlabel=one.panel, ylabel="s", title=one.quantity)
        axis.set_xticks(x, [f"{value:g}" for value in x], minor=False)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.minorticks_off()
        axis.legend(fontsize="small")
    for axis in axes.flat[len(series) :]:
        axis.remove()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
