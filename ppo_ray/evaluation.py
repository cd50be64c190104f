"""What held-out prompts say of a policy."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ppo_ray import atomic


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what the policy made of it."""

    prompt: str
    response: str
    score: float | None
    """None: it could not be scored."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one response to each held-out prompt."""

    mean_score: float
    """Over the scored responses; NaN if there is none."""
    std_score: float
    """Sample standard deviation over them; NaN if there are fewer than two."""
    num_prompts: int
    num_unscored: int
    """Prompts whose response could not be scored; they are in neither figure above."""
    kl_per_sequence: float | None
    """KL to the reference, nats summed over a response; None: not measured."""
    samples: tuple[Sample, ...]
    """The first prompts, to be looked at."""

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        atomic.write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**fields | {"samples": tuple(Sample(**sample) for sample in fields["samples"])})
