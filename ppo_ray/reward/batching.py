"""Batches of a classifier's texts: how they are padded, and what is found out about a model by trying it.

Dimensions: B texts, T tokens of the longest.
"""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Batching = Literal["right", "left", "equal", "alone"]
"""Texts are padded on that side; a batch holds texts of one length only; a batch holds one text."""

PROBE_LENGTHS = (11, 11, 5, 17, 70)
"""Tokens of the texts that a model is tried with; two are of one length."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one text."""

    ids: list[int]
    types: list[int]
    """Token types; all 0 where the tokenizer has none."""

    @classmethod
    def of(cls, encoding: Mapping[str, Any]) -> Self:
        """Take what a tokenizer returns for one text."""
        ids = list(encoding["input_ids"])
        return cls(ids, list(encoding.get("token_type_ids") or [0] * len(ids)))


class Inputs:
    """Makes a model's inputs of texts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a model and its tokenizer."""
        self._model, self._type_of_padding = model, tokenizer.pad_token_type_id
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._configs = (model.config, model.config.get_text_config())
        self.num_ids = _num_ids(model)
        """Token ids that the model has an embedding of; None: it has no table of them."""
        known = {getattr(config, "pad_token_id", None) for config in self._configs}
        valid = [pad_id for pad_id in known if pad_id is not None and 0 <= pad_id < (self.num_ids or 2**31)]
        self._pad_id = valid[0] if valid else None

    def make(self, texts: Sequence[Encoded], side: str = "right") -> dict[str, torch.Tensor]:
        """Pad texts on one side to the longest.

        Many models read a text's score off its last token that is not `pad_token_id` of their config, even where a mask
        says what is padding. So texts are padded with that id, whatever the tokenizer's is. A config without one means
        the last token, whichever it is: then it is given one that none of these texts ends with.

        Args:
            texts: B of them.
            side: `"right"` or `"left"`.

        Returns:
            `input_ids`, `attention_mask` and, if the model knows several types of tokens, `token_type_ids`: `[B, T]`
            int64 on the model's device.
        """
        pad_id = self._pad_id
        if pad_id is None:
            pad_id = next(iter(set(range(len(texts) + 1)) - {text.ids[-1] for text in texts}))
            for config in self._configs:
                config.pad_token_id = pad_id
        width = max(len(text.ids) for text in texts)

        def fill(row: list[int], value: int) -> list[int]:
            padding = [value] * (width - len(row))
            return [*padding, *row] if side == "left" else [*row, *padding]

        rows = {
            "input_ids": [fill(text.ids, pad_id) for text in texts],
            "attention_mask": [fill([1] * len(text.ids), 0) for text in texts],
        }
        # all 0 is what models take for granted; some tokenizers say 0 for models whose types are something else
        if self._takes_types and any(any(text.types) for text in texts):
            rows["token_type_ids"] = [fill(text.types, self._type_of_padding) for text in texts]
        return {name: torch.tensor(values, device=self._model.device) for name, values in rows.items()}


def make_probes(tokenizer: Any, num_ids: int | None) -> list[str]:
    """Make texts of a tokenizer's own vocabulary to try a model with, the same each time: one for each probe length."""
    draw, known = random.Random(0), min(len(tokenizer), num_ids or len(tokenizer))
    texts = []
    for _ in PROBE_LENGTHS:
        ids = [draw.randrange(known) for _ in range(4 * max(PROBE_LENGTHS))]
        words = tokenizer.decode(ids, skip_special_tokens=True)
        texts.append(words.encode("utf-8", "ignore").decode("utf-8") or "film " * len(ids))
    return texts


@torch.inference_mode()
def find_position_limit(model: Any, make_inputs: Callable[[int], dict[str, torch.Tensor]]) -> int | None:
    """Find out how many tokens a model's tables of positions have room for; None: it has no such table.

    What a config says may be more: RoBERTa's table has two rows that no position uses. So the model is run on texts of
    three short lengths. A table that is read one row further per token is one of positions.

    Args:
        model: on any device.
        make_inputs: makes the inputs of a text of that many tokens.
    """
    reads = []
    for length in (5, 7, 9):  # odd, so that no index of rotary tables, whose width is even, looks like one of pairs
        inputs = make_inputs(length)
        with _TableReads(model) as found:
            model(**inputs)
        reads.append((inputs["input_ids"].shape[1], found.last_rows))
    (first, start), *others = reads
    limits = []
    for table, (row, num_rows) in start.items():
        if all(length > first and rows.get(table, (0, 0))[0] - row == length - first for length, rows in others):
            limits.append(first + num_rows - 1 - row)
    return min(limits, default=None)


def find_batching(
    score: Callable[[Sequence[int], Batching], torch.Tensor],
    alone: torch.Tensor,
    lengths: Sequence[int],
    tolerance: float,
    may_pad: bool,
) -> Batching:
    """Return the first way of making batches that leaves every text's scores as they are alone.

    Args:
        score: scores some of the texts, by index, in one batch: `[B, labels]`.
        alone: the scores of each text alone, `[B, labels]`.
        lengths: tokens of each text.
        tolerance: largest difference.
        may_pad: whether padding is tried.
    """
    everyone = list(range(len(lengths)))
    equal = [index for index in everyone if lengths[index] == lengths[0]]
    ways: list[tuple[Batching, list[int]]] = [("right", everyone), ("left", everyone)] if may_pad else []
    for batching, chosen in [*ways, ("equal", equal)]:
        try:
            found = score(chosen, batching)
        except (RuntimeError, IndexError, ValueError):
            continue
        if found.shape == alone[chosen].shape and bool(((found - alone[chosen]).abs() <= tolerance).all()):
            return batching
    return "alone"


class _TableReads(TorchDispatchMode):
    """Notes the last row that is read of every parameter and buffer, by the address of its memory."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.last_rows: dict[int, tuple[int, int]] = {}
        """The last row read, and the number of rows."""
        tensors = [*model.parameters(), *model.buffers()]
        self._tables = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.dim() > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "embedding":
            self._note(args[0], 0, args[1])
        elif name in ("index_select", "gather"):
            self._note(args[0], args[1], args[2])
        elif name == "index":
            for dim, rows in enumerate(args[1]):
                self._note(args[0], dim, rows)
        return func(*args, **(kwargs or {}))

    def _note(self, table: torch.Tensor, dim: int, rows: torch.Tensor | None) -> None:
        address = table.untyped_storage().data_ptr()
        if rows is None or rows.dtype == torch.bool or not rows.numel() or address not in self._tables:
            return
        if rows.dim() > 1 and rows.shape[-1] == rows.shape[-2]:  # for every pair of tokens: a table of distances
            return
        last = max(int(rows.max()), self.last_rows.get(address, (0, 0))[0])
        self.last_rows[address] = last, table.shape[dim]


def _num_ids(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None
