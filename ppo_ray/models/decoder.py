"""A transformers decoder over packed rows: hidden states at the tokens before response tokens, and nowhere else.

Dimensions: S rows, W tokens per row, N response tokens in all, H hidden units.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ppo_ray.errors import InputError, first_line
from ppo_ray.models.attention import use_bounds
from ppo_ray.models.packing import PackedRows, pack
from ppo_ray.models.support import find_config_problem, max_exact_tokens

_AGREEMENT = 1e-3  # relative; a model that computes something else is off by the values' own size


@dataclass(frozen=True)
class Traits:
    """What is found out about a decoder by running it."""

    hidden_size: int
    """H; not always the config's `hidden_size`: OPT-350m projects its last state."""
    packs: bool
    """Whether several sequences may lie in a row, and share what their prompts begin with."""
    takes_bounds: bool
    """Whether they need no mask where they lie end to end in one row."""


class Decoder:
    """Runs a model's layers; holds no parameters of its own."""

    def __init__(self, base_model: Any, traits: Traits | None = None) -> None:
        """Find out what the model can do, unless it is known.

        Args:
            base_model: a transformers model without its head, on its device, in eval mode.
            traits: what was found out before; the model may then be on the meta device. None: it is run.

        Raises:
            InputError: the model looks ahead, as encoders do, needs more than token ids, or computes NaN.
        """
        config = base_model.config
        self._name = config.name_or_path or type(base_model).__name__
        if problem := find_config_problem(config, is_critic=True):  # a policy was asked before
            raise InputError(f"the model {self._name!r} {problem}")
        self._base_model = base_model
        self._max_exact = max_exact_tokens(config)
        self._takes_positions = "position_ids" in inspect.signature(base_model.forward).parameters
        if traits is None:
            tokens = self._pick_tokens(8)
            traits = Traits(self._check_causal(tokens), *self._try_packing(tokens))
        elif traits.takes_bounds:
            use_bounds(base_model, lambda: True)
        self.traits = traits

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._base_model.parameters()).device

    def run(self, rows: PackedRows) -> torch.Tensor:
        """Run the layers; return `[N, H]`, the last hidden state of the token before each response token.

        Raises:
            ValueError: a row holds several sequences, which this model cannot keep apart.
            InputError: a sequence is so long that its figures would depend on its neighbours.
        """
        if self._max_exact and rows.longest > self._max_exact[0]:
            limit, rope = self._max_exact
            raise InputError(
                f"a sequence of {rows.longest} tokens: beyond {limit}, the {rope} positions of the model "
                f"{self._name!r} depend on the longest sequence of a batch, and so would all figures; keep to {limit}"
            )
        if rows.packed and not self.traits.packs:
            raise ValueError("this model cannot have several sequences in a row; lay them out with row_width=0")
        if rows.bounds is not None and self.traits.takes_bounds:
            return self._run(rows, rows.bounds)
        return self._run(rows, rows.attention_mask(block_diagonal=self.traits.packs))

    def _run(self, rows: PackedRows, attention_mask: torch.Tensor | None) -> torch.Tensor:
        positions = {"position_ids": rows.position_ids} if self._takes_positions else {}
        states = self._base_model(
            input_ids=rows.input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **positions,
        ).last_hidden_state
        return states.flatten(0, 1)[rows.predict_at]

    @torch.no_grad()
    def _pick_tokens(self, number: int) -> np.ndarray:
        """Pick token ids, spread over the vocabulary, whose embeddings differ: trying equal ones would show nothing.

        A vocabulary with fewer different tokens gives those that it has, again and again.
        """
        rows = self._base_model.get_input_embeddings().weight
        num_tokens = min(len(rows), self._base_model.config.get_text_config().vocab_size)
        picked: list[int] = []
        for index in np.linspace(1, num_tokens, 8 * number, dtype=np.int64) % num_tokens:
            if len(picked) < number and all(not agree(rows[index], rows[other]) for other in picked):
                picked.append(int(index))
        if len(picked) < 2:
            raise InputError(f"the model {self._name!r} has the same embedding for all tokens; its weights are damaged")
        return np.resize(picked, number)

    @torch.no_grad()
    def _check_causal(self, tokens: np.ndarray) -> int:
        """Check that a later token changes no earlier state: a prefix's value must not depend on what follows it.

        Returns:
            H, the width of a state.
        """
        early, later = tokens[[2, 3, 4, 5]], tokens[:2]  # these two differ
        responses = [np.append(early[2:], [token, 0]) for token in later]
        rows = pack([[0], [1]], [early[:2]] * 2, responses, self.device)
        # all states but that of the later token itself, the last one
        try:
            states = self._run(rows, rows.attention_mask(block_diagonal=False))
            first, second = (each[:-1] for each in states.chunk(2))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each model's own code has errors of its own
            raise InputError(
                f"the model {self._name!r} cannot be run on token ids alone ({type(error).__name__}: "
                f"{first_line(error)}); give a decoder that reads nothing else, such as GPT-2, Llama or Qwen"
            ) from error
        if not agree(first, second):
            raise InputError(
                f"the model {self._name!r} looks ahead at later tokens; give a decoder, such as GPT-2, Llama or Qwen"
            )
        return first.shape[-1]

    @torch.no_grad()
    def _try_packing(self, tokens: np.ndarray) -> tuple[bool, bool]:
        """Tell whether several sequences may lie in a row: the model attends, and only where it is let.

        Sliding windows, recurrent states and positions taken from the mask rule it out. If nothing rules it out, three
        short sequences are tried, together and alone. Two of them share a token, so the second lies in two pieces:
        attention that goes by places instead of positions shows there.

        Returns:
            Whether a mask keeps the sequences apart, and whether their bounds do; never these alone.
        """
        config = self._base_model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        windowed = set(layer_types) != {"full_attention"} if layer_types else getattr(config, "sliding_window", None)
        if windowed or getattr(self._base_model, "_is_stateful", False) or not self._takes_positions:
            return False, False
        prompts, responses = [tokens[:2], tokens[3:5], tokens[3:4]], [tokens[2:3], tokens[5:8], tokens[:3]]
        alone = [pack([[index]], prompts, responses, self.device) for index in range(3)]
        wanted = torch.cat([self._run(rows, rows.attention_mask(block_diagonal=False)) for rows in alone])

        def keeps_apart(rows: PackedRows, attention_mask: torch.Tensor | None) -> bool:
            try:
                return agree(self._run(rows, attention_mask), wanted)
            except (RuntimeError, ValueError, IndexError, TypeError):  # it cannot take a mask of four dimensions
                return False

        tree = pack([[0, 1, 2]], prompts, responses, self.device, shortest_shared=1)
        if not keeps_apart(tree, tree.attention_mask(block_diagonal=True)):
            return False, False
        row = pack([[0, 1, 2]], prompts, responses, self.device)
        return True, use_bounds(self._base_model, lambda: keeps_apart(row, row.bounds))


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Tell whether two computations of the same values differ by no more than rounding.

    Raises:
        InputError: the wanted values are not finite.
    """
    if not wanted.isfinite().all():
        raise InputError(
            "the model computes NaN or infinite states from finite weights; take a model or dtype that does not"
        )
    return bool(torch.allclose(found, wanted, rtol=_AGREEMENT, atol=_AGREEMENT * float(wanted.abs().mean())))


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of every transformers model in a module, in their order.

    Raises:
        InputError: there are none that transformers knows of.
    """
    layers: list[torch.nn.Module] = []
    for part in model.modules():
        names = getattr(part, "_no_split_modules", None) or ()
        stacks = [child for child in part.children() if isinstance(child, torch.nn.ModuleList)]
        layers += [layer for stack in stacks for layer in stack if type(layer).__name__ in names]
    if not layers:
        raise InputError(
            f"the layers of {type(model).__name__} cannot be told (transformers' _no_split_modules): leave out "
            "learner.sharding=fsdp2, learner.gradient_checkpointing and learner.compile, or choose another model"
        )
    return layers


def recompute_layers(model: torch.nn.Module) -> None:
    """Keep only the input of every decoder layer, and compute the rest again in the backward pass.

    transformers' own switch works in training mode alone, which would turn dropout on. This one is torch's, inside each
    layer's hooks. Without dropout there is no state of random generators to keep.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
