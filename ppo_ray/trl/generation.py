"""TRL 0.11's generation: one prompt at a time, or a list in left-padded batches."""

from collections.abc import Callable
from typing import Any

import torch

LengthSource = Callable[[], int] | None


def generate_one(
    model: Any, query: torch.Tensor, length_sampler: LengthSource, return_prompt: bool, arguments: dict[str, Any]
) -> torch.Tensor:
    """Answer one prompt `[P]`; returns `[1, T]`.

    Raises:
        ValueError: the prompt is not of one dimension.
    """
    if query.dim() != 1:
        raise ValueError(f"query_tensor has shape {tuple(query.shape)}; give [tokens], or a list of such")
    if length_sampler is not None:
        arguments = {**arguments, "max_new_tokens": length_sampler()}
    query = query.to(model.pretrained_model.device)
    output = model.generate(input_ids=query[None], attention_mask=torch.ones_like(query)[None], **arguments)
    return output if return_prompt else output[:, len(query) :]


def generate_batched(
    model: Any,
    tokenizer: Any,
    queries: list[torch.Tensor],
    length_sampler: LengthSource,
    batch_size: int,
    return_prompt: bool,
    arguments: dict[str, Any],
) -> list[torch.Tensor]:
    """Answer a list of prompts, `[P]` each, in batches padded on the left; returns `[T]` each, without padding.

    A response ends with its first end-of-sequence token, which is kept. `pad_to_multiple_of` and `remove_padding` among
    the arguments are TRL's: the first widens batches, the second set to False keeps what follows that token.
    """
    arguments = dict(arguments)
    multiple, cut = arguments.pop("pad_to_multiple_of", None), arguments.pop("remove_padding", True)
    device = model.pretrained_model.device
    responses: list[torch.Tensor] = []
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        if length_sampler is not None:
            arguments["max_new_tokens"] = length_sampler()
        width = max(len(query) for query in batch)
        width = width if multiple is None else -(-width // multiple) * multiple
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id or 0, device=device)
        attention_mask = torch.zeros_like(input_ids)
        for row, query in enumerate(batch):
            input_ids[row, width - len(query) :] = query.to(device)
            attention_mask[row, width - len(query) :] = 1
        outputs = model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        for query, output in zip(batch, outputs, strict=True):
            response = _until_eos(output[width:], tokenizer.eos_token_id) if cut else output[width:]
            responses.append(torch.cat([query.to(device), response]) if return_prompt else response)
    return responses


def _until_eos(response: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """Cut behind the first end-of-sequence token; TRL looks for it in the prompt too, and cuts there."""
    ends = (response == eos_token_id).nonzero() if eos_token_id is not None else response.new_empty(0)
    return response[: int(ends[0]) + 1] if len(ends) else response
