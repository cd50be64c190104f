"""An engine on transformers, for machines without vLLM and models that vLLM lacks; tests compare vLLM with it."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from ppo_ray.config import NO_TRUST, LoraConfig, Trust
from ppo_ray.errors import WorkerError
from ppo_ray.models.loading import cast, load_causal_lm
from ppo_ray.rollout.engine import Completion, FinishReason, GenerationRequest, Sampling, check_finite, check_requests
from ppo_ray.weights.snapshot import WeightSnapshot

_LOG = logging.getLogger(__name__)
_STEPS = 3
_TRIAL = ((0, 3 + _STEPS), (1, 1 + _STEPS), (2, 9 + _STEPS))
"""Number and tokens of each sequence of the trial at the start; the last `_STEPS` are appended one by one."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest difference of the logits of a batch and of a sequence alone, relative to their spread."""


class HFEngine:
    """An `Engine` over a transformers causal LM: one left-padded batch, a key-value cache, a generator per request.

    Models that cannot be computed so, such as Mamba's kin, sample one sequence after the other, without a cache.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        max_context: int = 512,
        trust: Trust = NO_TRUST,
        lora: LoraConfig | None = None,
    ) -> None:
        """Load the model on the GPU if there is one.

        Args:
            path: a Hugging Face folder or hub name; weights in safetensors.
            dtype: torch's name of what the model computes in, e.g. `"float32"` or `"bfloat16"`.
            max_context: prompt and response tokens of one sequence at most.
            trust: which revision, and what its files may do.
            lora: adapters that it is sent instead of weights; until then it computes without any. None: whole weights.

        Raises:
            InputError: the model cannot be loaded, or cannot have these adapters.
        """
        self.policy_version = -1
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_causal_lm(path, dtype=dtype, device=self._device, trust=trust)
        self._parameters = dict(self._model.named_parameters())
        if lora is not None:
            self._parameters = self._add_adapters(path, lora)
        self._max_context = max_context
        self._batches = self._can_batch()
        if not self._batches:
            _LOG.warning(
                "the model %r gives other logits in a padded batch than alone: its sequences are sampled one at a "
                "time, without a cache, which is exact and slow",
                path,
            )

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        """Sample one response per request, in the order of the requests; see `Engine.generate`.

        Raises:
            WorkerError: a request cannot be served, or the model's log-probabilities are not finite; see
                `check_requests` and `check_finite`.
        """
        self._model.to(self._device)
        check_requests(requests, self._model.config.get_text_config().vocab_size, self._max_context)
        order = list(range(len(requests)))
        groups = ([order] if order else []) if self._batches else [[row] for row in order]
        return [completion for group in groups for completion in self._answer(requests, group, sampling)]

    def _answer(self, requests: Sequence[GenerationRequest], group: list[int], sampling: Sampling) -> list[Completion]:
        """Answer some of the requests together; a response that has ended leaves the batch."""
        batch = _Batch(self._model, [requests[row].prompt_ids for row in group], self._device, cached=self._batches)
        generators = {row: torch.Generator().manual_seed(requests[row].seed) for row in group}
        responses: dict[int, list[int]] = {row: [] for row in group}
        logprobs: dict[int, list[float]] = {row: [] for row in group}
        reasons: dict[int, FinishReason] = {}
        running = group
        while running:
            row_logprobs = (batch.compute_logits() / (sampling.temperature or 1.0)).log_softmax(-1).cpu()  # [B, V]
            for row, of_row in zip(running, row_logprobs, strict=True):
                if of_row.isnan().any():
                    check_finite(requests[row], row, [*logprobs[row], math.nan])
                token = _sample(of_row, generators[row], sampling)
                responses[row].append(token)
                logprobs[row].append(of_row[token].item())
                if token in sampling.stop_token_ids:
                    reasons[row] = "stop"
                elif len(responses[row]) == requests[row].max_tokens:
                    reasons[row] = "length"
            places = [place for place, row in enumerate(running) if row not in reasons]
            running = [running[place] for place in places]
            batch.extend(places, [responses[row][-1] for row in running])
        return [Completion(tuple(responses[row]), tuple(logprobs[row]), reasons[row]) for row in group]

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Copy the snapshot into the model, or into its adapters; see `Engine.load_weights`."""
        parameters = self._parameters
        names = {entry.name for entry in snapshot.manifest.entries}
        if parameters.keys() != names:
            differing = sorted(parameters.keys() ^ names)
            raise WorkerError(f"the snapshot is of another model: {len(differing)} names differ, e.g. {differing[:3]}")
        self._model.to(self._device)
        with torch.no_grad():
            for tensors in snapshot.verify_buckets():
                self.policy_version = -1
                for name, tensor in tensors:
                    parameters[name].copy_(tensor)
        self.policy_version = snapshot.policy_version

    def _add_adapters(self, path: str, lora: LoraConfig) -> dict[str, torch.nn.Parameter]:
        """Put adapters into the model that change nothing, as the learner's; returns them by the names they travel by.

        They are float32, and their scale, which arrives in B, is 1.
        """
        from ppo_ray.models.adapter_files import make_adapter_config
        from ppo_ray.models.lora import ADAPTER, adapter_layers, adapter_parameters, add_adapters

        add_adapters(self._model, make_adapter_config(lora, path), 0)
        for layer in adapter_layers(self._model).values():
            layer.scaling[ADAPTER] = 1.0
        parameters = adapter_parameters(self._model)
        for parameter in parameters.values():
            cast(parameter, torch.float32)
        return parameters

    def sleep(self, keep_weights: bool = True) -> None:
        """Move the weights to the host's memory, in any case; see `Engine.sleep`."""
        self._model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the model."""
        del self._model, self._parameters

    @torch.inference_mode()
    def _can_batch(self) -> bool:
        """Tell whether sequences in a padded batch, with a cache, get the logits that each gets alone, without one.

        Recurrent models take padding for tokens, and some models keep what they have computed in another way. Three
        sequences are tried, of which one ends before the others.
        """
        vocab_size = self._model.config.get_text_config().vocab_size
        sequences = [[(17 * row + 5 * place + 1) % vocab_size for place in range(size)] for row, size in _TRIAL]
        alone = [_Batch(self._model, [ids], self._device, cached=False).compute_all() for ids in sequences]
        running = list(range(len(sequences)))
        try:
            batch = _Batch(self._model, [ids[:-_STEPS] for ids in sequences], self._device, cached=True)
            for step in range(_STEPS):
                for row, found in zip(running, batch.compute_logits(), strict=True):
                    wanted = alone[row][step - _STEPS - 1]
                    spread = wanted - wanted.mean()
                    if not (found - wanted).norm() <= _TOLERANCE[self._model.dtype] * spread.norm():  # NaN neither
                        return False
                places = [place for place in range(len(running)) if step or place != 1]
                running = [running[place] for place in places]
                batch.extend(places, [sequences[row][step - _STEPS] for row in running])
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
        return True


class _Batch:
    """Sequences that grow together, padded on the left.

    B sequences, T tokens so far, V vocabulary.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], device: torch.device, cached: bool) -> None:
        """Begin with prompts.

        Args:
            model: of transformers.
            prompts: `[P]` token ids each.
            device: of the model.
            cached: whether keys and values of earlier tokens are kept; otherwise there may be one prompt only, and all
                of it is computed anew for each token.
        """
        self._model, self._cached = model, cached
        longest = max(map(len, prompts))
        self._input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)  # [B, T]
        self._mask = torch.zeros_like(self._input_ids)
        for row, ids in enumerate(prompts):
            self._input_ids[row, longest - len(ids) :] = torch.tensor(ids, device=device)
            self._mask[row, longest - len(ids) :] = 1
        self._cache: Any = None

    def compute_logits(self) -> torch.Tensor:
        """Compute `[B, V]` float32, of the next token of each sequence."""
        if not self._cached:
            return self.compute_all()[-1:]
        new = slice(-1 if self._cache is not None else None, None)
        output = self._model(
            self._input_ids[:, new],
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, new],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1].float()

    def compute_all(self) -> torch.Tensor:
        """Compute `[T, V]` float32 of the only sequence, without a cache."""
        return self._model(self._input_ids, use_cache=False).logits[0].float()

    def extend(self, places: list[int], tokens: list[int]) -> None:
        """Append a token to each of the sequences at some places, and drop the others."""
        if len(places) < len(self._mask):
            kept = torch.tensor(places, dtype=torch.int64, device=self._mask.device)
            self._input_ids, self._mask = self._input_ids[kept], self._mask[kept]
            if self._cache is not None and places:
                self._cache.batch_select_indices(kept)
        column = torch.tensor(tokens, dtype=torch.int64, device=self._mask.device)[:, None]
        self._input_ids = torch.cat([self._input_ids, column], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(column)], 1)


def _sample(logprobs: torch.Tensor, generator: torch.Generator, sampling: Sampling) -> int:
    """Draw one token from `[V]` log-probabilities; greedy at temperature 0."""
    if sampling.temperature == 0:
        return int(logprobs.argmax())
    return int(torch.multinomial(logprobs.exp(), 1, generator=generator))
