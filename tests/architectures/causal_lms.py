"""Verdicts on causal LMs, tiny and random: the learner's and the engines' figures beside those of the model alone."""

import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ppo_ray.config import LoraConfig, ModelConfig, load_config
from ppo_ray.errors import InputError
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.sharding import Replicated
from ppo_ray.models.actor_critic import CausalLMWithValueHead
from ppo_ray.models.adapter_files import make_adapter_config, read_adapter_shapes
from ppo_ray.models.loading import load_causal_lm
from ppo_ray.models.lora import (
    adapter_layers,
    add_adapters,
    find_target_problem,
    matrices,
    merge_in_place,
    merge_weights,
    scale_adapters,
)
from ppo_ray.models.packing import make_microbatches, pack
from ppo_ray.models.support import find_config_problem
from ppo_ray.preflight import Inputs, _policy_problems
from ppo_ray.rollout.engine import Engine, GenerationRequest, Sampling
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.rollout.support import ADVICE
from ppo_ray.weights.snapshot import WeightSnapshot
from tests.architectures.tiny import FOR_VLLM, make_model, save_tokenizer, tiny_config
from tests.learning import save_policy

TEMPERATURE = 0.8
SIZES = [(1, 1), (2, 5), (7, 15), (3, 3), (12, 9), (1, 20), (5, 8), (18, 4)]
"""Tokens of prompt and response; most are longer than the attention windows of 8."""
TOLERANCE = 2e-5
"""Of figures, nats; of a parameter's gradient, relative to its norm."""
CLOSE = 1e-3
"""Of an engine's figures, nats, as a run's self-check has it."""


def draw_tokens(*lengths: int) -> list[np.ndarray]:
    """Draw token ids that every vocabulary has, without the special ones."""
    draw = np.random.default_rng(sum(lengths))
    return [draw.integers(3, 250, length) for length in lengths]


SEQUENCES = [draw_tokens(*size) for size in SIZES]
for longer, shorter in ((4, 2), (7, 4), (6, 2)):  # prompts that begin alike, which the learner's rows may share
    common = min(SIZES[longer][0], SIZES[shorter][0]) - 1
    SEQUENCES[longer][0][:common] = SEQUENCES[shorter][0][:common]
REQUESTS = [
    GenerationRequest(tuple(draw_tokens(size)[0].tolist()), max_tokens=4 + size % 9, seed=size)
    for size in (1, 12, 5, 20)
]


def compute_alone(causal_lm: Any, prompt: np.ndarray, response: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model's own forward pass over one sequence, without padding, mask or cache.

    Returns:
        Log-probabilities of the response's tokens `[R]`, and what the output embedding was given before each `[R, H]`.
    """
    seen: list[torch.Tensor] = []
    head = causal_lm.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
    logits = causal_lm(input_ids=ids, use_cache=False).logits[0]
    handle.remove()
    at = slice(len(prompt) - 1, -1)
    logprobs = (logits[at].float() / TEMPERATURE).log_softmax(-1).gather(1, torch.from_numpy(response)[:, None])
    return logprobs[:, 0], seen[0].reshape(ids.shape[1], -1)[at]


def compute_packed(policy: CausalLMWithValueHead) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run the learner's passes; return log-probabilities and values of each sequence, `[R]` each."""
    prompts, responses = zip(*SEQUENCES, strict=True)
    lengths = [sum(size) - 1 for size in SIZES]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    batches = make_microbatches(lengths, budget=48, row_width=32 if policy.traits.packs else 0)
    if policy.traits.packs:
        batches = [[[4, 0, 7], [2, 6]], [[5, 1, 3]]]  # under a mask, where tokens are shared; and by bounds
    for rows in batches:
        output = policy(pack(rows, prompts, responses, shortest_shared=3 if policy.traits.packs else 0))
        assert output.values is not None
        for row, index in enumerate(sorted(chain.from_iterable(rows))):
            size = len(responses[index])
            found[index] = output.logprobs[row, :size], output.values[row, :size]
    return [found[index] for index in range(len(SIZES))]


def differentiate(
    policy: CausalLMWithValueHead, figures: list[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the gradient of a random sum of all figures for each parameter that has one."""
    draw = torch.Generator().manual_seed(3)
    loss = sum((torch.randn(len(part), generator=draw) * part).sum() for pair in figures for part in pair)
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def check_run(folder: Path, engine: str) -> None:
    """Raise what a run with this policy would refuse before anything starts."""
    options = ["steps=1", "output_dir=run", "prompts.path=prompts", "reward.function=builtins:len"]
    options += [f"model.path={folder}", f"rollout.engine={engine}", "prompts.max_tokens=32"]
    options += ["rollout.max_response_tokens=32"]
    if problems := list(_policy_problems(load_config(None, options), Inputs())):
        raise InputError(problems[0])


def judge_learner(folder: Path) -> str:
    """Compare the learner's passes with the model's own over each sequence alone, and what is saved with what was."""
    check_run(folder, "hf")
    policy = CausalLMWithValueHead(load_causal_lm(str(folder)), temperature=TEMPERATURE)
    wanted = []
    for prompt, response in SEQUENCES:
        logprobs, states = compute_alone(policy.causal_lm, prompt, response)
        wanted.append((logprobs, policy.value_head(states)[:, 0]))
    assert max(float(logprobs.std()) for logprobs, _ in wanted[1:]) > 0.1, "the weights do not matter"
    found = compute_packed(policy)
    for part, name in enumerate(("log-probabilities", "values")):
        worst = max(float((a[part] - b[part]).detach().abs().max()) for a, b in zip(found, wanted, strict=True))
        if not worst <= TOLERANCE:
            return f"wrong: {name} are off by {worst:.1e}"
    gradients, right = (differentiate(policy, figures) for figures in (found, wanted))
    total = torch.stack([gradient.norm() for gradient in right.values()]).norm()
    for name, gradient in right.items():
        worst = float((gradients[name] - gradient).norm() / (gradient.norm() + 0.01 * total))
        if not worst <= TOLERANCE:
            return f"wrong: the gradient of {name} is off by {worst:.1e} of it"
    with tempfile.TemporaryDirectory() as saved:
        save_policy(policy, Path(saved))
        loaded = AutoModelForCausalLM.from_pretrained(saved).eval()
    again, _ = compute_alone(loaded, *SEQUENCES[2])
    return "exact" if torch.equal(again, wanted[2][0]) else "wrong: what is saved is another model"


@torch.no_grad()
def judge_engine(folder: Path, start: Callable[[str], Engine], tolerance: float, lora: LoraConfig | None = None) -> str:
    """Compare an engine's log-probabilities with the model's own, with the folder's weights and with new ones.

    With `lora` these are the folder's, and adapters of which the engine is sent nothing else.
    """
    policy = CausalLMWithValueHead(load_causal_lm(str(folder)), temperature=TEMPERATURE)
    if lora is not None:
        add_adapters(policy.causal_lm, make_adapter_config(lora, str(folder)), 0)

    def find_difference() -> float:
        worst = 0.0
        for request, completion in zip(REQUESTS, engine.generate(REQUESTS, Sampling(TEMPERATURE)), strict=True):
            ids = np.array(request.prompt_ids), np.array(completion.response_ids)
            wanted, _ = compute_alone(policy.causal_lm, *ids)
            worst = max(worst, float((wanted - torch.tensor(completion.logprobs)).abs().max()))
        return worst

    engine = start(str(folder))
    for module in policy.modules():  # vLLM may have decorated the class of a module, and asks its objects for this
        module.do_not_compile = True
    try:
        before = find_difference()
        if not before <= CLOSE:
            return f"wrong: off by {before:.1e} nats"
        draw = torch.Generator().manual_seed(5)
        if lora is None:
            for parameter in policy.causal_lm.parameters():
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=draw))
            sent = Replicated(policy, Ranks()).weights()
        else:
            for layer in adapter_layers(policy.causal_lm).values():
                matrices(layer)[1].normal_(std=0.1, generator=draw)
            sent = scale_adapters(policy.causal_lm)
        assert find_difference() > 5 * CLOSE, "the weights do not matter"
        engine.load_weights(WeightSnapshot.take(sent, 1))
        after = find_difference()
        if not after <= CLOSE:
            return f"wrong: off by {after:.1e} nats after a weight update"
    finally:
        engine.close()
    return "exact" if max(before, after) <= tolerance else f"within {CLOSE:g} nats"


def judge_hf(folder: Path) -> str:
    """Judge the transformers engine."""
    return judge_engine(folder, lambda path: HFEngine(path, max_context=64), 5 * TOLERANCE)


def judge_vllm(folder: Path) -> str:
    """Judge vLLM, in this process."""
    check_run(folder, "vllm")
    from ppo_ray.rollout.vllm import VLLMEngine

    options = {"max_context": 64, "max_num_seqs": 8, "kv_cache_mib": 32}
    return judge_engine(folder, lambda path: VLLMEngine(path, **options), 10 * TOLERANCE)


@torch.no_grad()
def merge_adapters(name: str) -> float | str:
    """Put adapters into all linear maps of a tiny model, and merge them.

    Returns:
        The largest difference of logits between the model with its adapters and the merged one; or why it gets none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_model(AutoModelForCausalLM, tiny_config(name), embedding_size=0.2).eval()
        lora, ids = LoraConfig(rank=4), torch.from_numpy(draw_tokens(20)[0])[None]
        if problem := find_target_problem(model, lora):
            return problem
        before, names = model(input_ids=ids, use_cache=False).logits, [name for name, _ in model.named_parameters()]
        try:
            add_adapters(model, make_adapter_config(lora, "base"), 0)
        except InputError as error:
            return str(error)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before), "new adapters change something"
        for layer in adapter_layers(model).values():
            matrices(layer)[1].normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        adapted = model(input_ids=ids, use_cache=False).logits
        assert (adapted - before).abs().max() > 0.01, "the adapters do not matter"
        merged = {name: tensor.clone() for name, tensor in merge_weights(model)}
        merge_in_place(model)
        assert list(merged) == names
        assert all(torch.equal(tensor, merged[name]) for name, tensor in model.named_parameters())
        return float((model(input_ids=ids, use_cache=False).logits - adapted).abs().max())


def judge_adapters(folder: Path) -> str:
    """Judge vLLM with adapters of all linear maps, sent alone, in this process."""
    from ppo_ray.rollout.vllm import VLLMEngine

    lora = LoraConfig(rank=4)
    shapes = read_adapter_shapes(ModelConfig(path=str(folder), lora=lora))
    options = {"max_context": 64, "max_num_seqs": 8, "kv_cache_mib": 32, "adapters": shapes}
    return judge_engine(folder, lambda path: VLLMEngine(path, **options), 10 * TOLERANCE, lora)


JUDGES = {"learner": judge_learner, "transformers engine": judge_hf, "vLLM": judge_vllm, "adapters": judge_adapters}
"""The columns of the table."""


def judge(name: str, folder: Path, columns: Sequence[str]) -> dict[str, str]:
    """Say of an architecture "exact", "within ...", "refused: ...", "fails: ..." or "wrong: ...", column by column.

    Args:
        name: of the architecture.
        folder: empty; the tiny model goes there.
        columns: keys of `JUDGES`. What the learner refuses is not given to engines.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(name)
        if columns[0] in ("vLLM", "adapters"):
            others = FOR_VLLM.get(name, {})
            config = tiny_config(name, **others)
            for key in others.keys() - set(dir(config)):
                setattr(config, key, others[key])
        if problem := find_config_problem(config):
            return {"learner": shorten(problem)}
        make_model(AutoModelForCausalLM, config, embedding_size=0.2).save_pretrained(folder)
        save_tokenizer(folder)
        config.save_pretrained(folder)  # where the causal LM is a part of the whole, its own config was saved
        verdicts = {}
        for column in columns:
            try:
                verdicts[column] = JUDGES[column](folder)
            except InputError as error:
                verdicts[column] = shorten(str(error))
                break
            except AssertionError:
                raise
            except Exception as error:
                words = re.sub("WorkerError: vLLM (.*) with '[^']*'", r"\1", f"{type(error).__name__}: {error}".strip())
                verdicts[column] = f"fails: {words.partition(f'. {ADVICE}')[0].splitlines()[0][:160]}"
    return verdicts


def shorten(reason: str) -> str:
    """Say why something is refused without the model's name and what to do about it."""
    reason = re.sub(r"^(\S+: )?(the model '[^']*' )?", "", reason)
    return "refused: " + re.split(r"(?<=[^.])(; |\. )", reason)[0].replace("|", "\\|")
