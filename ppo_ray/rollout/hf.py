"""An engine on transformers, for machines without vLLM; tests compare vLLM with it."""

from collections.abc import Sequence

import torch

from ppo_ray.config import NO_TRUST, Trust
from ppo_ray.errors import WorkerError
from ppo_ray.models.loading import load_causal_lm
from ppo_ray.rollout.engine import Completion, FinishReason, GenerationRequest, Sampling, check_requests
from ppo_ray.weights.snapshot import WeightSnapshot


class HFEngine:
    """An `Engine` over a transformers causal LM: one left-padded batch, a key-value cache, a generator per request.

    B requests, T tokens so far, V vocabulary.
    """

    def __init__(self, path: str, *, dtype: str = "float32", max_context: int = 512, trust: Trust = NO_TRUST) -> None:
        """Load the model on the GPU if there is one.

        Args:
            path: a Hugging Face folder or hub name; weights in safetensors.
            dtype: torch's name of what the model computes in, e.g. `"float32"` or `"bfloat16"`.
            max_context: prompt and response tokens of one sequence at most.
            trust: which revision, and what its files may do.

        Raises:
            InputError: the model cannot be loaded.
        """
        self.policy_version = -1
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_causal_lm(path, dtype=dtype, device=self._device, trust=trust)
        self._max_context = max_context

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        """Sample one response per request, in the order of the requests; see `Engine.generate`.

        Raises:
            WorkerError: a request cannot be served; see `check_requests`.
        """
        if not requests:
            return []
        self._model.to(self._device)
        check_requests(requests, self._model.config.get_text_config().vocab_size, self._max_context)
        longest = max(len(request.prompt_ids) for request in requests)
        input_ids, attention_mask = self._pad(requests, longest)  # [B, P]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        stop_ids = set(sampling.stop_token_ids)
        responses: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        reasons: list[FinishReason | None] = [None] * len(requests)
        cache = None
        while None in reasons:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            output = self._model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            temperature = sampling.temperature or 1.0
            row_logprobs = (output.logits[:, -1].float() / temperature).log_softmax(-1).cpu()  # [B, V]
            tokens = [
                _sample(row, generator, sampling) for row, generator in zip(row_logprobs, generators, strict=True)
            ]
            for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
                if reasons[row] is None:
                    responses[row].append(token)
                    logprobs[row].append(row_logprobs[row, token].item())
                    if token in stop_ids:
                        reasons[row] = "stop"
                    elif len(responses[row]) == request.max_tokens:
                        reasons[row] = "length"
            input_ids = torch.tensor(tokens, device=self._device)[:, None]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(requests), 1)], 1)
        return [
            Completion(tuple(response), tuple(logprob), reason or "length")
            for response, logprob, reason in zip(responses, logprobs, reasons, strict=True)
        ]

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Copy the snapshot into the model; see `Engine.load_weights`."""
        parameters = dict(self._model.named_parameters())
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

    def sleep(self) -> None:
        """Move the weights to the host's memory; see `Engine.sleep`."""
        self._model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the model."""
        del self._model

    def _pad(self, requests: Sequence[GenerationRequest], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad prompts on the left; returns token ids and attention mask, each `[B, longest]` int64."""
        input_ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            input_ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, longest - len(request.prompt_ids) :] = 1
        return input_ids.to(self._device), attention_mask.to(self._device)


def _sample(logprobs: torch.Tensor, generator: torch.Generator, sampling: Sampling) -> int:
    """Draw one token from `[V]` log-probabilities; greedy at temperature 0."""
    if sampling.temperature == 0:
        return int(logprobs.argmax())
    return int(torch.multinomial(logprobs.exp(), 1, generator=generator))
