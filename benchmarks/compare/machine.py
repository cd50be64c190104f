"""What this machine can do: `python -m benchmarks.compare.machine MODEL TOKENS RESPONSE_TOKENS ROWS THREADS`.

A process of its own, with as many threads as the arms have; prints JSON. The arms' shares of these rates are in the
report.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.flops import DecoderShape

_REPEATS = 15
_COPY_BYTES = 512 << 20
_LARGE = 2048


@dataclass(frozen=True)
class Machine:
    """Rates of float32 products and of copying; products are of a model's linear maps, in its own proportions."""

    update_flops: float
    """FLOP per second of the products of a forward and backward pass over a whole batch's tokens, the head's over its
    response tokens. What shares of the machine are counted by."""
    decode_flops: float
    """Of the forward products of one token per sequence, each layer's weights read anew: what generation could be."""
    large_flops: float
    """Of square matrices of 2048, for comparison."""
    copy_bytes: float
    """Bytes per second copied from memory to memory, each read and written once."""


def measure(shape: DecoderShape, tokens: int, response_tokens: int, rows: int) -> Machine:
    """Measure with the threads that torch has.

    Args:
        shape: of the model.
        tokens: that matter, of a batch.
        response_tokens: of a batch.
        rows: sequences that are generated at once.
    """
    kinds = [(*kind[:2], kind[2] * shape.layers, tokens) for kind in shape.products]
    kinds.append((shape.hidden, shape.vocab, 1, response_tokens))
    flops = seconds = 0.0
    for inputs, outputs, number, batch in kinds:
        flops += number * 3 * 2 * inputs * outputs * batch
        seconds += number * sum(median_s(product) for product in _products(inputs, outputs, batch))
    left, right = torch.randn(2, _LARGE, _LARGE)
    source, target = torch.ones(2, _COPY_BYTES // 4)
    return Machine(
        update_flops=flops / seconds,
        decode_flops=_decode_rate(shape, rows),
        large_flops=2 * _LARGE**3 / median_s(lambda: torch.mm(left, right)),
        copy_bytes=_COPY_BYTES / median_s(lambda: target.copy_(source)),
    )


def median_s(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after two that do not count."""
    seconds = []
    for _ in range(_REPEATS + 2):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _products(inputs: int, outputs: int, batch: int) -> list[Callable[[], torch.Tensor]]:
    """Return a linear map's three products: its output, and the gradients of its input and of its weight."""
    states, weight, gradient = torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(batch, outputs)
    return [lambda: states @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ states]


def _decode_rate(shape: DecoderShape, rows: int) -> float:
    kinds = [kind[:2] for kind in shape.products for _ in range(kind[2] * shape.layers)] + [(shape.hidden, shape.vocab)]
    weights = [torch.randn(outputs, inputs) for inputs, outputs in kinds]
    states = {inputs: torch.randn(rows, inputs) for inputs, _ in kinds}
    flops = sum(2 * rows * weight.numel() for weight in weights)
    return flops / median_s(lambda: [states[weight.shape[1]] @ weight.T for weight in weights])


def main() -> None:
    model, tokens, response_tokens, rows, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape = DecoderShape.read(Path(model))
    with torch.inference_mode():
        print(json.dumps(asdict(measure(shape, int(tokens), int(response_tokens), int(rows)))))


if __name__ == "__main__":
    main()
