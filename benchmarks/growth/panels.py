"""Measures of one process, without Ray: learner, engine and weights, as batch, response length and model grow.

`benchmarks.growth` runs this module in a process of its own, whose environment is that of the package's actors.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.flops import forward_flops, update_flops
from benchmarks.growth.series import EPOCHS, FULL, QUICK, Point, Scale, Series
from benchmarks.random_batches import Range, lengths_of, make_table, random_completions, random_requests
from benchmarks.random_models import decoder_shape, write_model
from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.rollout.engine import Engine, GenerationRequest, Sampling
from ppo_ray.weights.snapshot import Buffers

ROUNDS = 3
"""In which each call is timed."""

Batches = Sequence[tuple[float, Sequence[GenerationRequest]]]
"""What was varied, and the batch that it makes."""


class Subject:
    """A learner and an engine of the same model, and what is done to both."""

    def __init__(self, shape: str, folder: Path, scale: Scale, max_context: int) -> None:
        """Write the model and load it into both."""
        config = write_model(shape, folder)
        self.shape = decoder_shape(config)
        self.learner = PPOLearner.load(
            ModelConfig(path=str(folder)), UpdateConfig(epochs=EPOCHS), LearnerConfig(), temperature=1.0
        )
        self.engine = _start(scale.engine, str(folder), max_context)
        self.parameters = sum(tensor.numel() for _, tensor in self.learner.named_weights())
        self._scale, self._buffers = scale, Buffers()

    def requests(self, number: int, responses: Range, prompts: Range = (2, 8)) -> list[GenerationRequest]:
        return random_requests(number, prompts, responses, self.shape.vocab)

    def learn(self, batches: Batches) -> list[Point]:
        """Measure an update on each batch."""
        tables = [make_table(batch, random_completions(batch, self.shape.vocab)) for _, batch in batches]
        seconds = self._seconds([partial(self.learner.update, table, 0) for table in tables])
        forward = [forward_flops(self.shape, lengths_of(batch)) for _, batch in batches]
        epochs = [update_flops(self.shape, lengths_of(batch), EPOCHS) for _, batch in batches]
        looks = [_looks(batch) for _, batch in batches]
        work = [(look * one + more) / 1e9 for look, one, more in zip(looks, forward, epochs, strict=True)]
        return [Point(x, *rest) for (x, _), *rest in zip(batches, work, seconds, strict=True)]

    def generate(self, batches: Batches) -> list[Point]:
        """Measure the generation of each batch."""
        seconds = self._seconds([partial(self.engine.generate, batch, Sampling()) for _, batch in batches])
        work = [forward_flops(self.shape, lengths_of(batch)) / 1e9 for _, batch in batches]
        return [Point(x, *rest) for (x, _), *rest in zip(batches, work, seconds, strict=True)]

    def publish(self, x: float) -> Point:
        """Measure the copy of the weights to the host, sealed with checksums."""
        return Point(x, self._gigabytes, *self._seconds([partial(self.learner.weights, buffers=self._buffers)]))

    def load(self, x: float) -> Point:
        """Measure the weights' way into the engine, verified."""
        snapshot = self.learner.weights(buffers=self._buffers)
        return Point(x, self._gigabytes, *self._seconds([partial(self.engine.load_weights, snapshot)]))

    @property
    def _gigabytes(self) -> float:
        return 4 * self.parameters / 1e9

    def _seconds(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Return the median of the seconds that each call takes, once all have been made.

        They take turns: a machine that is slower for a while is slower for all of them.
        """
        for call in calls:
            call()
        seconds: list[list[float]] = [[] for _ in calls]
        for _ in range(ROUNDS):
            for call, found in zip(calls, seconds, strict=True):
                begun = time.perf_counter()
                while True:
                    start = time.perf_counter()
                    call()
                    now = time.perf_counter()
                    found.append(now - start)
                    if now - begun >= self._scale.round_s:
                        break
        return [statistics.median(found) for found in seconds]


def _looks(batch: Sequence[GenerationRequest]) -> int:
    """Return how many models look at a batch before it is learnt: the reference, and the policy too if one forward pass
    does not hold it; of one pass the policy's is the first epoch's own. A single sequence is one pass."""
    tokens = sum(sum(lengths) - 1 for lengths in lengths_of(batch))
    return 1 if len(batch) == 1 or tokens <= LearnerConfig().microbatch_tokens else 2


def over_batch(subject: Subject, scale: Scale) -> Iterator[Series]:
    """Measure update and generation as there are more trajectories."""
    batches = [(size, subject.requests(size, (4, 16))) for size in scale.batches]
    yield Series("learner's update", "batch", "GFLOP", subject.learn(batches))
    yield Series("generation", "batch", "GFLOP", subject.generate(batches))


def over_length(subject: Subject, scale: Scale) -> Iterator[Series]:
    """Measure update and generation as responses are longer; prompts are short, for their tokens are cheaper."""
    batches = {length: subject.requests(scale.responses(length), (length, length), (2, 2)) for length in scale.lengths}
    generated = [(length, batches[length]) for length in scale.generated_lengths]
    yield Series("learner's update", "response tokens", "GFLOP", subject.learn(list(batches.items())))
    yield Series("generation", "response tokens", "GFLOP", subject.generate(generated))


def over_size(scale: Scale) -> list[Series]:
    """Measure update, generation and weights as the model is larger."""
    name = "parameters, millions"
    series = [
        Series("learner's update", name, "GFLOP"),
        Series("generation", name, "GFLOP"),
        Series("weights published", name, "GB"),
        Series("weights loaded", name, "GB"),
    ]
    for shape in scale.shapes:
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(shape, Path(folder), scale, max_context=64)
            x = round(subject.parameters / 1e6, 1)
            batch = [(x, subject.requests(scale.size_batch, (4, 16)))]
            points = *subject.learn(batch), *subject.generate(batch), subject.publish(x), subject.load(x)
            subject.engine.close()
        for one, point in zip(series, points, strict=True):
            one.points.append(point)
    return series


def measure(panels: Sequence[str], scale: Scale) -> list[Series]:
    """Measure some of `batch` and `length`, with one start of the engine, or `size`."""
    if "size" in panels:
        return over_size(scale)
    with tempfile.TemporaryDirectory() as folder:
        longest = 8 + max(16, scale.generated_lengths[-1])
        subject = Subject(scale.shapes[0], Path(folder), scale, max_context=longest)
        series: list[Series] = []
        for panel in panels:
            series += {"batch": over_batch, "length": over_length}[panel](subject, scale)
        subject.engine.close()
    return series


def _start(engine: str, path: str, max_context: int) -> Engine:
    if engine == "hf":
        from ppo_ray.rollout.hf import HFEngine

        return HFEngine(path, max_context=max_context)
    from ppo_ray.rollout.vllm import VLLMEngine

    return VLLMEngine(path, max_context=max_context)


def main() -> None:
    """Measure the panels that are named, and leave them in a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("panels", nargs="+", choices=["batch", "length", "size", "workers"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    if "workers" in options.panels:
        from benchmarks.growth.workers import over_workers  # the only panel with Ray

        series = over_workers(scale)
    else:
        series = measure(options.panels, scale)
    options.output.write_text(json.dumps([asdict(one) for one in series]))


if __name__ == "__main__":
    main()
