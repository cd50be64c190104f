"""TRL 0.11's generation: a call's arguments, a check that the learner can learn from its samples, and the sampling.

The learner's log-probabilities are those of the full softmax at one temperature. A truncated or penalised distribution
gives the same tokens other log-probabilities, so every ratio and every KL would be silently wrong. Such calls are
refused.

Dimensions: P prompt tokens, T prompt and response tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, None),
    "top_p": (1.0, None),
    "min_p": (None, 0.0),
    "top_h": (None, 1.0),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "repetition_penalty": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
    "penalty_alpha": (0.0, None),
    "guidance_scale": (1.0, None),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "min_new_tokens": (0, None),
}
"""Options of transformers' generation, and the values at which they leave the distribution alone."""
_NEUTRAL_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "assistant_model", "custom_generate")

TokenIds = torch.Tensor | list[torch.Tensor]
"""Token ids of one sequence, or of a list of sequences."""


class LengthSampler:
    """Draws lengths uniformly from a HALF-OPEN range, by numpy's global generator: (2, 8) never gives 8."""

    def __init__(self, min_value: int, max_value: int) -> None:
        """Draw from min_value, ..., max_value - 1.

        Raises:
            ValueError: the range is empty.
        """
        if max_value <= min_value:
            raise ValueError(
                f"LengthSampler({min_value}, {max_value}) has nothing to draw: the range is half-open, "
                "max_value itself is never drawn; give a larger one"
            )
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """Draw a length."""
        return int(np.random.choice(self.values))


@dataclass(frozen=True)
class GenerateCall:
    """The arguments of one call of `PPOTrainer.generate`."""

    queries: TokenIds
    """One prompt, `[P]`, or a list of prompts."""
    length_sampler: Callable[[], int] | None
    """Draws `max_new_tokens`, once per `batch_size` prompts; None: `arguments` say it."""
    batch_size: int
    """Prompts of a list that are sampled together."""
    return_prompt: bool
    """Whether the answers begin with their prompts."""
    arguments: dict[str, Any]
    """For transformers' `generate`."""


def sampling_temperature(generation_config: Any, arguments: dict[str, Any]) -> float:
    """Return the temperature that `generate(**arguments)` samples at.

    Args:
        generation_config: the model's own, of transformers; what the arguments leave open follows it.
        arguments: of `generate`.

    Raises:
        ValueError: it would not sample from the full softmax; names every option that forbids it.
    """
    effective = copy.deepcopy(arguments.get("generation_config") or generation_config)
    defaults = {"top_k": 50, "do_sample": False, "temperature": 1.0, "min_length": 0}  # transformers' own
    given = {name: value for name, value in arguments.items() if name != "generation_config"}
    effective.update(**given)

    def value_of(name: str) -> Any:
        value = getattr(effective, name, None)
        return defaults.get(name) if value is None and name not in given else value

    wrong = [f"{name}={value_of(name)!r}" for name, neutral in _NEUTRAL.items() if value_of(name) not in neutral]
    wrong += [name for name in _NEUTRAL_ARGUMENTS if arguments.get(name)]
    if (value_of("min_length") or 0) > 0:
        wrong.append(f"min_length={value_of('min_length')!r}")
    if not value_of("do_sample"):
        wrong.append("do_sample=False")
    if wrong:
        raise ValueError(
            f"generate({', '.join(wrong)}): PPO learns from samples of the full softmax, and cannot account for tokens "
            "drawn in another way. Pass do_sample=True, top_k=0, top_p=1.0 and no penalties or minimum lengths (use "
            "trainer.model.generate for samples that are not learnt from)"
        )
    return float(value_of("temperature"))


def generate(model: Any, tokenizer: Any, call: GenerateCall) -> TokenIds:
    """Answer prompts with transformers' `generate`.

    A response to a prompt of a list ends with its first end-of-sequence token, which is kept. TRL adds two arguments
    for lists: `pad_to_multiple_of` widens batches; `remove_padding=False` keeps what follows that token.

    Args:
        model: an `AutoModelForCausalLMWithValueHead`, in eval mode.
        tokenizer: the model's.
        call: what to answer, and how.

    Returns:
        `[1, T]` for one prompt; for a list a list of `[T]`, without padding.

    Raises:
        ValueError: a single prompt is not of one dimension.
    """
    if isinstance(call.queries, list):
        return _generate_in_batches(model, tokenizer, call, call.queries)
    query, arguments = call.queries, call.arguments
    if query.dim() != 1:
        raise ValueError(f"query_tensor has shape {tuple(query.shape)}; give [tokens], or a list of such")
    if call.length_sampler is not None:
        arguments = {**arguments, "max_new_tokens": call.length_sampler()}
    query = query.to(model.pretrained_model.device)
    output = model.generate(input_ids=query[None], attention_mask=torch.ones_like(query)[None], **arguments)
    return output if call.return_prompt else output[:, len(query) :]


def _generate_in_batches(
    model: Any, tokenizer: Any, call: GenerateCall, queries: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Answer a list of prompts in batches padded on the left."""
    arguments = dict(call.arguments)
    multiple, cut = arguments.pop("pad_to_multiple_of", None), arguments.pop("remove_padding", True)
    device = model.pretrained_model.device
    responses: list[torch.Tensor] = []
    for start in range(0, len(queries), call.batch_size):
        batch = queries[start : start + call.batch_size]
        if call.length_sampler is not None:
            arguments["max_new_tokens"] = call.length_sampler()
        width = max(len(query) for query in batch)
        width = width if multiple is None else -(-width // multiple) * multiple
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id or 0, device=device)
        attention_mask = torch.zeros_like(input_ids)
        for row, query in enumerate(batch):
            input_ids[row, width - len(query) :] = query.to(device)
            attention_mask[row, width - len(query) :] = 1
        outputs = model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        for query, output in zip(batch, outputs, strict=True):
            response = _cut_after_eos(output[width:], tokenizer.eos_token_id) if cut else output[width:]
            responses.append(torch.cat([query.to(device), response]) if call.return_prompt else response)
    return responses


def _cut_after_eos(response: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """Cut after the first end-of-sequence token; TRL looks for it in the prompt too, and cuts there."""
    ends = (response == eos_token_id).nonzero() if eos_token_id is not None else response.new_empty(0)
    return response[: int(ends[0]) + 1] if len(ends) else response
