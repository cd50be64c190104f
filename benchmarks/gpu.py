"""What a step costs on one GPU: `python benchmarks/gpu.py [--shape notebook 1b] [--response-tokens 256]`.

Needs torch, transformers and this package: no Ray, no vLLM, no model, no data. The package's learner and its
transformers engine share the GPU in one process, in bfloat16 with float32 master weights, as
`model.dtype=bfloat16` has them. A step generates a batch, updates the policy (policy and reference look at the batch,
then four epochs learn it), and gives the engine the new weights. The weights are random, and so are prompts and scores.
The first step warms up and is in no figure.

`notebook` is GPT-2's shape of 124M at TRL's notebook's batch of 128 with 4 to 16 response tokens, `1b` that of Llama
3.2 1B. Without a GPU, or with CUDA_VISIBLE_DEVICES set to nothing, a tiny shape runs on the CPU.
"""

import argparse
import datetime
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.card import Peak, find_peak, forget_peak_memory, free_bytes, name_of, peak_memory, synchronize
from benchmarks.flops import forward_flops, update_flops
from benchmarks.random_batches import Range, lengths_of, make_table, random_requests
from benchmarks.random_models import SHAPES, decoder_shape, write_config, write_model
from ppo_ray.config import Config
from ppo_ray.errors import InputError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.models.loading import default_device
from ppo_ray.plan.engine import rollout_terms
from ppo_ray.plan.learner import learner_terms
from ppo_ray.plan.sizes import ModelSizes
from ppo_ray.rollout.engine import GenerationRequest, Sampling
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.weights.snapshot import Buffers

PROMPT_TOKENS: Range = (2, 8)
PHASES = {
    "generate_s": "generate",
    "forwards_s": "old and reference",
    "update_s": "epochs",
    "learner_s": "learner in all",
    "sync_s": "weights to engine",
    "step_s": "step",
}
"""What is timed; `learner_s` is `forwards_s` and `update_s`, and `step_s` all of it."""


@dataclass(frozen=True)
class Result:
    """What one shape cost."""

    shape: str
    parameters: int
    batch_size: int
    response_tokens: Range
    microbatch_tokens: int
    seconds: dict[str, float]
    """By phase: the median of the steps."""
    samples_per_s: float
    learner_mfu: float
    """Model FLOPs utilisation: operations on tokens that matter, over seconds, over the peak."""
    step_mfu: float
    generate_mfu: float
    peak_memory_gib: float


def measure(shape: str, options: argparse.Namespace, peak: Peak, folder: Path) -> Result:
    """Run some steps of one shape.

    Raises:
        InputError: the device has not the memory for it.
    """
    device = default_device()
    config = make_config(shape, options, folder)
    responses = (config.rollout.min_response_tokens, config.rollout.max_response_tokens)
    batch_size, sizes = config.rollout.batch_size, decoder_shape(write_config(shape, folder))
    parameters = _check_memory(config, device, shape)
    try:
        write_model(shape, folder, torch.bfloat16, str(device))
        engine = HFEngine(str(folder), dtype="bfloat16", max_context=config.max_context)
        learner = PPOLearner.load(config.model, config.ppo, config.learner, temperature=config.rollout.temperature)
        buffers, taken, lengths = Buffers(), [], []
        for step in range(1 + options.steps):
            if step == 1:
                forget_peak_memory(device)
            requests = random_requests(batch_size, PROMPT_TOKENS, responses, sizes.vocab, step)
            taken.append(_step(engine, learner, requests, buffers, device, step))
            lengths.append(lengths_of(requests))
    except torch.OutOfMemoryError as error:
        line = str(error).partition("\n")[0]
        raise InputError(f"{shape}: out of memory on {name_of(device)}: {line} {_REMEDY}") from error
    seconds = {phase: statistics.median(step[phase] for step in taken[1:]) for phase in PHASES}
    forward = statistics.fmean(forward_flops(sizes, step) for step in lengths[1:])
    epochs = statistics.fmean(update_flops(sizes, step, config.ppo.epochs) for step in lengths[1:])
    update = forward + epochs  # at least: the first epoch's forward pass knows the old log-probabilities
    return Result(
        shape,
        parameters,
        batch_size,
        responses,
        config.learner.microbatch_tokens,
        seconds,
        samples_per_s=batch_size / seconds["step_s"],
        learner_mfu=update / seconds["learner_s"] / peak.tflops / 1e12,
        step_mfu=(forward + update) / seconds["step_s"] / peak.tflops / 1e12,
        generate_mfu=forward / seconds["generate_s"] / peak.tflops / 1e12,
        peak_memory_gib=peak_memory(device) / 2**30,
    )


def _step(
    engine: HFEngine,
    learner: PPOLearner,
    requests: Sequence[GenerationRequest],
    buffers: Buffers,
    device: torch.device,
    step: int,
) -> dict[str, float]:
    """Make one step and return the seconds of its phases; the device is idle at every look at the clock."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    start = now()
    completions = engine.generate(requests, Sampling())
    generated = now()
    table = make_table(requests, completions, step)
    made = now()
    update = learner.update(table, step)
    learnt = now()
    engine.load_weights(learner.weights(buffers=buffers))
    loaded = now()
    return {
        "generate_s": generated - start,
        "forwards_s": update.metrics["time/old_s"] + update.metrics["time/estimate_s"],
        "update_s": update.metrics["time/update_s"],
        "learner_s": learnt - made,
        "sync_s": loaded - learnt,
        "step_s": loaded - start,
    }


def make_config(shape: str, options: argparse.Namespace, folder: Path) -> Config:
    responses = [options.response_tokens] * 2 if options.response_tokens else [4, 16]
    gpus = float(torch.cuda.is_available())
    return Config.model_validate(
        {
            "output_dir": str(folder),
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "prompts": {"path": "none", "max_tokens": PROMPT_TOKENS[1]},
            "rollout": {
                "engine": "hf",
                "dtype": "bfloat16",
                "gpus": gpus,
                "batch_size": options.batch_size or (16 if shape == "tiny" else 128),
                "min_response_tokens": responses[0],
                "max_response_tokens": responses[1],
                "max_context": max(512, PROMPT_TOKENS[1] + responses[1]),
            },
            "reward": {"function": "none:none"},
            "learner": {"microbatch_tokens": options.microbatch_tokens, "gpus": gpus},
        }
    )


_REMEDY = "Lower --batch-size, --response-tokens or --microbatch-tokens, or choose a smaller --shape."


def _check_memory(config: Config, device: torch.device, shape: str) -> int:
    """Hold what learner and engine will need, by the package's own estimate, against what is free.

    Returns:
        The policy's parameters.

    Raises:
        InputError: it is more.
    """
    sizes = ModelSizes.read(config)
    where = "gpu" if device.type == "cuda" else "host"
    terms = [*learner_terms(config, sizes, 0), *rollout_terms(config, sizes)]
    terms = [term for term in terms if term.device == where and not term.what.startswith(("process", "CUDA"))]
    needed, free = sum(term.num_bytes for term in terms), free_bytes(device)
    if needed > free:
        listed = "\n".join(f"  {term.what}: {term.num_bytes / 2**30:.1f} GiB = {term.how}" for term in terms)
        raise InputError(
            f"{shape} needs about {needed / 2**30:.1f} GiB and {name_of(device)} has {free / 2**30:.1f} GiB free:\n"
            f"{listed}\n{_REMEDY}"
        )
    return sizes.policy.parameters


def show(results: Sequence[Result], card: str, peak: Peak, console: Console) -> None:
    """Print seconds, utilisation and memory, a column a shape."""
    console.print(f"{card}, bfloat16, peak {peak.tflops:.3g} TFLOP/s ({peak.source})", highlight=False)
    table = Table("median of the steps", *(result.shape for result in results))
    rows = {
        "parameters": [f"{result.parameters / 1e6:,.1f}M" for result in results],
        "batch": [f"{result.batch_size}" for result in results],
        "response tokens": ["{} to {}".format(*result.response_tokens) for result in results],
        "tokens a micro-batch": [f"{result.microbatch_tokens}" for result in results],
        **{f"{name}, s": [f"{result.seconds[phase]:.3f}" for result in results] for phase, name in PHASES.items()},
        "samples per second": [f"{result.samples_per_s:.1f}" for result in results],
        "MFU of the learner": [f"{result.learner_mfu:.1%}" for result in results],
        "MFU of generation": [f"{result.generate_mfu:.1%}" for result in results],
        "MFU of the step": [f"{result.step_mfu:.1%}" for result in results],
        "peak memory, GiB": [f"{result.peak_memory_gib:.2f}" for result in results],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["auto", *SHAPES]
    parser.add_argument("--shape", nargs="+", default=["auto"], choices=shapes, help="auto: notebook 1b, or tiny")
    parser.add_argument("--steps", type=int, default=5, help="after the first, which warms up")
    parser.add_argument("--batch-size", type=int, help="responses per step; 128, tiny: 16")
    parser.add_argument("--response-tokens", type=int, help="of every response; without it 4 to 16 are drawn")
    parser.add_argument("--microbatch-tokens", type=int, default=4096, help="tokens a forward pass of the learner")
    parser.add_argument("--peak-tflops", type=float, help="of the card, bfloat16, dense")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every shape, print, and leave the figures in a file."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device = default_device()
    peak, card = find_peak(device, options.peak_tflops), name_of(device)
    on_auto = ["notebook", "1b"] if device.type == "cuda" else ["tiny"]
    shapes = dict.fromkeys(name for shape in options.shape for name in (on_auto if shape == "auto" else [shape]))
    results = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.append(measure(shape, options, peak, Path(folder)))
            except InputError as error:
                parser.exit(2, f"{parser.prog}: {error}\n")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(results, card, peak, Console(width=100))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = {"date": datetime.date.today().isoformat(), "card": card, "peak": asdict(peak), **versions}
        options.json.write_text(json.dumps(record | {"results": [asdict(result) for result in results]}, indent=1))


if __name__ == "__main__":
    main()
