"""What a trainer's model can be given, and which tokens end its responses."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ppo_ray.models.support import find_positions
from ppo_ray.models.tokens import find_end_tokens

TokenIds = torch.Tensor | list[torch.Tensor]
"""Token ids of one sequence, or of a list of sequences."""


@dataclass(frozen=True)
class Limits:
    """What a model can be given."""

    vocab_size: int
    """It knows the ids from 0 to `vocab_size - 1`."""
    positions: int | None
    """Tokens of a sequence that its config has positions for; None: it does not say."""
    is_hard: bool
    """Whether there is nothing to compute beyond: it has a table of positions, of that length."""

    def check_ids(self, name: str, ids: torch.Tensor) -> None:
        """Raise ValueError if these are not `[tokens]`, at least one, all in the vocabulary."""
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError(f"{name} is {ids.dtype} {tuple(ids.shape)}; it must be [tokens], at least one")
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(unknown):
            raise ValueError(f"{name} has the token id {int(unknown[0])}; the model knows 0 to {self.vocab_size - 1}")

    def check_length(self, name: str, num_tokens: int) -> None:
        """Raise ValueError if a sequence is longer than can be computed; warn if it is longer than the config says."""
        if self.positions is None or num_tokens <= self.positions:
            return
        if self.is_hard:
            raise ValueError(f"{name}: {num_tokens} tokens; the model has {self.positions} positions")
        warnings.warn(
            f"{name}: {num_tokens} tokens; the model's config has {self.positions} positions. What it computes beyond "
            "them is transformers' own, and it may never have been trained on it",
            UserWarning,
            stacklevel=2,
        )


def find_limits(model: Any) -> Limits:
    """Return what a causal LM of transformers can be given.

    A table of positions is an embedding other than that of tokens, or a buffer named after positions, of as many rows
    as the config has positions, or two more, as OPT has it. Without a table positions are computed, but for MPT: its
    forward pass makes the table.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    vocab_size = min(int(one.weight.shape[0]) for one in embeddings if one is not None)
    positions = find_positions(model.config)
    if positions is None:
        return Limits(vocab_size, None, False)
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tables = [table for table in tables if table is not embeddings[0].weight]
    tables += [buffer for name, buffer in model.named_buffers() if "pos" in name and buffer.dim() == 2]
    is_hard = any(positions <= len(table) <= positions + 2 for table in tables) or model.config.model_type == "mpt"
    return Limits(vocab_size, positions, is_hard)


def check_queries(queries: TokenIds, limits: Limits) -> None:
    """Raise ValueError for a prompt that is not `[tokens]`, or has ids that the model does not know."""
    for index, query in enumerate(queries if isinstance(queries, list) else [queries]):
        limits.check_ids(f"query_tensor[{index}]" if isinstance(queries, list) else "query_tensor", query)


def find_ends(model: Any, tokenizer: Any, arguments: dict[str, Any], limits: Limits) -> tuple[int, ...]:
    """Return the token ids that end a response of `generate(**arguments)`.

    They are the tokenizer's end of sequence and those of the model's generation config; an `eos_token_id` among the
    arguments replaces them all.

    Args:
        model: a causal LM of transformers.
        tokenizer: the model's.
        arguments: of `generate`.
        limits: of the model.

    Raises:
        ValueError: an `eos_token_id` is neither a token id nor a list of them.
    """
    vocab_size = limits.vocab_size
    own = getattr(arguments.get("generation_config"), "eos_token_id", None)
    if "eos_token_id" not in arguments and own is None:
        return find_end_tokens(tokenizer.eos_token_id, model.generation_config.eos_token_id, vocab_size).ids
    given = arguments.get("eos_token_id", own)
    return find_end_tokens(None, given.tolist() if isinstance(given, torch.Tensor) else given, vocab_size).ids
