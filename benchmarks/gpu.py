"""What a step costs on one GPU: `python benchmarks/gpu.py [--work notebook 0.5b] [--response-tokens 256]`.

Needs torch, transformers and this package: no Ray, no vLLM, no model, no data. The package's learner and its
transformers engine share the GPU in one process, in bfloat16 with float32 master weights, as
`model.dtype=bfloat16` has them. A step generates a batch, updates the policy (policy and reference look at the batch,
then the epochs learn it), and gives the engine the new weights. The weights are random, and so are prompts and scores.
The first step warms up and is in no figure.

`WORKS` has what is measured, some of it with what others have published for the same work. Without a GPU, or with
CUDA_VISIBLE_DEVICES set to nothing, a tiny model runs on the CPU.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.card import Peak, find_peak, forget_peak_memory, free_bytes, name_of, peak_memory, synchronize
from benchmarks.flops import forward_flops, update_flops
from benchmarks.gpu_work import WORKS, make_config
from benchmarks.random_batches import Range, lengths_of, make_table, random_completions, random_requests
from benchmarks.random_models import decoder_shape, write_config, write_model
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
    """What one work cost."""

    work: str
    parameters: int
    batch_size: int
    prompt_tokens: Range
    response_tokens: Range
    microbatch_tokens: int
    seconds: dict[str, float]
    """By phase: the median of the steps."""
    published_s: float | None
    """A step of the same work by others."""
    samples_per_s: float
    tokens_per_s: float
    """Of prompts and responses, over the step."""
    learner_mfu: float
    """Model FLOPs utilisation: operations on tokens that matter, over seconds, over the peak."""
    step_mfu: float
    generate_mfu: float | None
    peak_memory_gib: float
    planned_memory_gib: float
    """By `ppo-ray plan`'s estimate, without the process and CUDA."""


def measure(name: str, options: argparse.Namespace, peak: Peak, folder: Path) -> Result:
    """Run some steps of one work.

    Raises:
        InputError: the device has not the memory for it.
    """
    device, work = default_device(), WORKS[name]
    config = make_config(name, options, folder)
    responses = (config.rollout.min_response_tokens, config.rollout.max_response_tokens)
    batch_size, shape = config.rollout.batch_size, decoder_shape(write_config(work.model, folder))
    parameters, planned = _check_memory(config, device, name)
    try:
        write_model(work.model, folder, torch.bfloat16, str(device))
        engine = None if work.alone else HFEngine(str(folder), dtype="bfloat16", max_context=config.max_context)
        learner = PPOLearner.load(config.model, config.ppo, config.learner, temperature=config.rollout.temperature)
        buffers, taken, lengths = Buffers(), [], []
        for step in range(1 + options.steps):
            if step == 1:
                forget_peak_memory(device)
            requests = random_requests(batch_size, work.prompts, responses, shape.vocab, step)
            taken.append(_step(engine, learner, requests, buffers, device, step, shape.vocab))
            lengths.append(lengths_of(requests))
    except torch.OutOfMemoryError as error:
        line = str(error).partition("\n")[0]
        raise InputError(f"{name}: out of memory on {name_of(device)}: {line} {_REMEDY}") from error
    seconds = {phase: statistics.median(step[phase] for step in taken[1:]) for phase in PHASES}
    forward = statistics.fmean(forward_flops(shape, step) for step in lengths[1:])
    learnt = [shape, *([replace(shape, vocab=0)] if config.model.critic == "separate" else [])]  # a critic has no head
    epochs, frozen = config.ppo.epochs, config.model.lora is not None
    each = [sum(update_flops(model, step, epochs, frozen) for model in learnt) for step in lengths[1:]]
    update = forward + statistics.fmean(
        each
    )  # at least: the first epoch's forward pass knows the old log-probabilities
    generated = 0.0 if engine is None else forward
    return Result(
        name,
        parameters,
        batch_size,
        work.prompts,
        responses,
        config.learner.microbatch_tokens,
        seconds,
        work.published_s,
        samples_per_s=batch_size / seconds["step_s"],
        tokens_per_s=statistics.fmean(sum(map(sum, step)) for step in lengths[1:]) / seconds["step_s"],
        learner_mfu=update / seconds["learner_s"] / peak.tflops / 1e12,
        step_mfu=(generated + update) / seconds["step_s"] / peak.tflops / 1e12,
        generate_mfu=None if engine is None else forward / seconds["generate_s"] / peak.tflops / 1e12,
        peak_memory_gib=peak_memory(device) / 2**30,
        planned_memory_gib=planned / 2**30,
    )


def _step(
    engine: HFEngine | None,
    learner: PPOLearner,
    requests: Sequence[GenerationRequest],
    buffers: Buffers,
    device: torch.device,
    step: int,
    vocab: int,
) -> dict[str, float]:
    """Make one step and return the seconds of its phases; the device is idle at every look at the clock."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    start = now()
    completions = engine.generate(requests, Sampling()) if engine else random_completions(requests, vocab)
    generated = now()
    table = make_table(requests, completions, step)
    made = now()
    update = learner.update(table, step)
    learnt = now()
    if engine:
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


_REMEDY = "Lower --batch-size, --response-tokens or --microbatch-tokens, or choose a smaller --work."


def _check_memory(config: Config, device: torch.device, name: str) -> tuple[int, int]:
    """Hold what learner and engine will need, by the package's own estimate, against what is free.

    Returns:
        The policy's parameters, and the bytes.

    Raises:
        InputError: it is more.
    """
    sizes = ModelSizes.read(config)
    where = "gpu" if device.type == "cuda" else "host"
    terms = [*learner_terms(config, sizes, 0), *([] if WORKS[name].alone else rollout_terms(config, sizes))]
    terms = [term for term in terms if term.device == where and not term.what.startswith(("process", "CUDA"))]
    needed, free = sum(term.num_bytes for term in terms), free_bytes(device)
    if needed > free:
        listed = "\n".join(f"  {term.what}: {term.num_bytes / 2**30:.1f} GiB = {term.how}" for term in terms)
        raise InputError(
            f"{name} needs about {needed / 2**30:.1f} GiB and {name_of(device)} has {free / 2**30:.1f} GiB free:\n"
            f"{listed}\n{_REMEDY}"
        )
    return sizes.policy.parameters, needed


def show(results: Sequence[Result], card: str, peak: Peak, console: Console) -> None:
    """Print seconds, utilisation and memory, one column per work."""
    console.print(f"{card}, bfloat16, peak {peak.tflops:.3g} TFLOP/s ({peak.source})", highlight=False)
    table = Table("median of the steps", *(result.work for result in results))
    rows = {
        "parameters": [f"{result.parameters / 1e6:,.1f}M" for result in results],
        "batch": [f"{result.batch_size}" for result in results],
        "prompt tokens": ["{} to {}".format(*result.prompt_tokens) for result in results],
        "response tokens": ["{} to {}".format(*result.response_tokens) for result in results],
        "tokens per micro-batch": [f"{result.microbatch_tokens}" for result in results],
        **{f"{name}, s": [f"{result.seconds[phase]:.3f}" for result in results] for phase, name in PHASES.items()},
        "the same work by others, s": [f"{result.published_s or '-'}" for result in results],
        "samples per second": [f"{result.samples_per_s:.1f}" for result in results],
        "tokens per second": [f"{result.tokens_per_s:,.0f}" for result in results],
        "MFU of the learner": [f"{result.learner_mfu:.1%}" for result in results],
        "MFU of generation": [
            "-" if result.generate_mfu is None else f"{result.generate_mfu:.1%}" for result in results
        ],
        "MFU of the step": [f"{result.step_mfu:.1%}" for result in results],
        "peak memory, GiB": [f"{result.peak_memory_gib:.2f}" for result in results],
        "the same, planned": [f"{result.planned_memory_gib:.2f}" for result in results],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = ["auto", *WORKS]
    parser.add_argument("--work", nargs="+", default=["auto"], choices=works, help="auto: all on a GPU, tiny on a CPU")
    parser.add_argument("--steps", type=int, default=5, help="after the first, which warms up")
    parser.add_argument("--batch-size", type=int, help="responses per step, instead of the work's")
    parser.add_argument("--response-tokens", type=int, help="of every response, instead of the work's")
    parser.add_argument(
        "--microbatch-tokens", type=int, help="tokens per forward pass of the learner, instead of the work's"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the card, bfloat16, dense")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every work, print, and leave the figures in a file."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device = default_device()
    peak, card = find_peak(device, options.peak_tflops), name_of(device)
    on_auto = [name for name in WORKS if name != "tiny"] if device.type == "cuda" else ["tiny"]
    works = dict.fromkeys(name for work in options.work for name in (on_auto if work == "auto" else [work]))
    results = []
    for name in works:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.append(measure(name, options, peak, Path(folder)))
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
