"""TRL 0.11's generation: a call's arguments, a check that the learner can learn from its samples, and the sampling.

The learner's log-probabilities are those of the full softmax at one temperature. A truncated or penalised distribution
gives the same tokens other log-probabilities, so every ratio and every KL would be silently wrong. Such calls are
refused.

Dimensions: P prompt tokens, T prompt and response tokens.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ppo_ray.trl.limits import Limits, TokenIds, find_limits

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
    ends: tuple[int, ...]
    """Token ids that end a response."""


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

    A response ends with the first token of `call.ends`, which is kept. TRL adds two arguments for lists:
    `pad_to_multiple_of` widens batches; `remove_padding=False` keeps what follows that token.

    Args:
        model: an `AutoModelForCausalLMWithValueHead`, in eval mode.
        tokenizer: the model's.
        call: what to answer, and how.

    Returns:
        `[1, T]` for one prompt; for a list a list of `[T]`, without padding.

    Raises:
        ValueError: a prompt is not `[tokens]`, or has ids or a length that the model does not know; or padding could
            not be told from tokens.
    """
    limits = find_limits(model.pretrained_model)
    call = replace(call, arguments=call.arguments | {"eos_token_id": list(call.ends) or None})
    if isinstance(call.queries, list):
        return _generate_in_batches(model, tokenizer, call, call.queries, limits)
    query, arguments = call.queries, _draw_length(call, [call.queries], limits)
    query = query.to(model.pretrained_model.device)
    output = model.generate(input_ids=query[None], attention_mask=torch.ones_like(query)[None], **arguments)
    return output if call.return_prompt else output[:, len(query) :]


def _draw_length(call: GenerateCall, batch: list[torch.Tensor], limits: Limits) -> dict[str, Any]:
    """Return the arguments for a batch, its length drawn; raise ValueError if the model has too few positions."""
    arguments = dict(call.arguments)
    if call.length_sampler is not None:
        arguments["max_new_tokens"] = call.length_sampler()
    limit = arguments.get("max_new_tokens")
    if limit is not None:
        longest = max(len(query) for query in batch)
        limits.check_length(f"a prompt of {longest} tokens and max_new_tokens={limit}", longest + limit)
    return arguments


def _generate_in_batches(
    model: Any, tokenizer: Any, call: GenerateCall, queries: list[torch.Tensor], limits: Limits
) -> list[torch.Tensor]:
    """Answer a list of prompts in batches padded on the left."""
    arguments = dict(call.arguments)
    multiple, cut = arguments.pop("pad_to_multiple_of", None), arguments.pop("remove_padding", True)
    pad = arguments.pop("pad_token_id", None)
    pad = _choose_padding(tokenizer.pad_token_id if pad is None else pad, cut, limits)
    _refuse_other_stops(model.pretrained_model.generation_config, call)
    call = replace(call, arguments=arguments | {"pad_token_id": pad})
    device = model.pretrained_model.device
    responses: list[torch.Tensor] = []
    for start in range(0, len(queries), call.batch_size):
        batch = queries[start : start + call.batch_size]
        drawn = _draw_length(call, batch, limits)
        width = max(len(query) for query in batch)
        width = width if multiple is None else -(-width // multiple) * multiple
        input_ids = torch.full((len(batch), width), pad, device=device)
        attention_mask = torch.zeros_like(input_ids)
        for row, query in enumerate(batch):
            input_ids[row, width - len(query) :] = query.to(device)
            attention_mask[row, width - len(query) :] = 1
        outputs = model.generate(input_ids=input_ids, attention_mask=attention_mask, **drawn)
        for query, output in zip(batch, outputs, strict=True):
            response = _cut_after_end(output[width:], call.ends) if cut else output[width:]
            responses.append(torch.cat([query.to(device), response]) if call.return_prompt else response)
    return responses


def _choose_padding(pad_token_id: int | None, cut: bool, limits: Limits) -> int:
    """Return an id to pad with: any that the model knows will do, as padding is masked and cut off."""
    if pad_token_id is not None and 0 <= pad_token_id < limits.vocab_size:
        return pad_token_id
    if not cut and pad_token_id is not None:
        raise ValueError(
            f"generate(pad_token_id={pad_token_id}, remove_padding=False): the model knows 0 to "
            f"{limits.vocab_size - 1}; resize its embeddings, or give another id"
        )
    return 0


def _refuse_other_stops(generation_config: Any, call: GenerateCall) -> None:
    """Raise ValueError where padding could not be told from tokens: what follows a stop that is no token."""
    own = call.arguments.get("generation_config") or generation_config
    stops = {
        "stop_strings": call.arguments.get("stop_strings") or getattr(own, "stop_strings", None),
        "stopping_criteria": call.arguments.get("stopping_criteria"),
    }
    given = [name for name, stop in stops.items() if stop]
    if given and call.batch_size > 1:
        raise ValueError(
            f"generate({given[0]}=..., batch_size={call.batch_size}): the padding behind a response that stops so "
            "could not be told from its tokens, and would be learnt from; give batch_size=1"
        )


def _cut_after_end(response: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Cut after the first token that ends a response; TRL looks for it in the prompt too, and cuts there."""
    found = torch.isin(response, torch.tensor(ends, dtype=response.dtype, device=response.device)).nonzero()
    return response[: int(found[0]) + 1] if len(found) else response
