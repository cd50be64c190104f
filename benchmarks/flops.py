"""Model FLOPs of the tokens that matter: what a step's arithmetic must be, whoever does it.

The last token of a sequence matters to nobody: nothing is predicted from it. The head matters where a response token is
predicted. Padding, and whatever else is computed beside, does not count. A product of [m, k] and [k, n] is 2 m k n.
Norms, activations, softmax, value head and optimizer are left out: less than a hundredth.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ppo_ray.errors import InputError


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder."""

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Heads times their size."""
    key_width: int
    """The same of keys and values."""
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read a model's config.json.

        Raises:
            InputError: it is of another architecture.
        """
        if config["model_type"] != "llama":
            raise InputError(f"model_type={config['model_type']}: only the products of a llama's layers are known here")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        size = config.get("head_dim") or hidden // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            query_width=heads * size,
            key_width=(config.get("num_key_value_heads") or heads) * size,
            vocab=config["vocab_size"],
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the config of the model in a folder; raises as `of`."""
        return cls.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """Inputs, outputs and number of each kind of linear map in a layer: q and o, k and v, gate and up, down."""
        return [
            (self.hidden, self.query_width, 2),
            (self.hidden, self.key_width, 2),
            (self.hidden, self.intermediate, 2),
            (self.intermediate, self.hidden, 1),
        ]

    @property
    def parameters(self) -> int:
        """In the linear maps of all layers."""
        return self.layers * sum(inputs * outputs * number for inputs, outputs, number in self.products)


def forward_flops(shape: DecoderShape, lengths: Iterable[tuple[int, int]]) -> float:
    """Count one forward pass over sequences of so many prompt and response tokens, each token once.

    Generation with a key-value cache is the same.
    """
    total = 0
    for prompt, response in lengths:
        tokens = prompt + response - 1
        attended = tokens * (tokens + 1) // 2  # pairs of a token and one that it sees
        total += 2 * shape.parameters * tokens
        total += 4 * shape.layers * shape.query_width * attended  # scores, and the mean of the values by them
        total += 2 * shape.hidden * shape.vocab * response
    return float(total)


def update_flops(shape: DecoderShape, lengths: Iterable[tuple[int, int]], epochs: int, frozen: bool = False) -> float:
    """Count the epochs' forward and backward passes; a backward one has two products for each of the forward's.

    Beside frozen weights it has one: they have no gradient. What adapters compute is little, and does not count.
    """
    return (2 if frozen else 3) * epochs * forward_flops(shape, lengths)
