"""An engine on vLLM, in this process: the engine of rollout workers on CPU and GPU.

The in-process engine core starts in a third of the time of the multi-process one, takes a third of its memory and lets
weights be handed over by reference. `ENVIRONMENT` must be set before `vllm` is imported: actors have it in their
runtime environment, and the engine sets what is still missing.
"""

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ppo_ray.config import NO_TRUST, Transport, Trust
from ppo_ray.errors import WorkerError, WorkerLost, first_line
from ppo_ray.plan.demand import CPU_ENVIRONMENT
from ppo_ray.plan.engine import HOST_BLOCK
from ppo_ray.rollout.engine import Completion, GenerationRequest, Sampling, check_finite, check_requests
from ppo_ray.rollout.support import ADVICE, explain_start
from ppo_ray.rollout.vllm_sleep import Sleep
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import WeightSnapshot

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that vLLM reads when it is imported."""

GPU_ENVIRONMENT = {
    # Attention in float32 is Triton's, which would cut its operands to TensorFloat-32: 2e-3 nats off, twice what a
    # run's self-check takes.
    "TRITON_F32_DEFAULT": "ieee",
    # Without its compiler FlashInfer's sampler cannot be built, and seeded sampling does not use it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Environment variables beside `ENVIRONMENT` on a GPU."""

# The KV cache's size is given, yet vLLM still refuses to start on a GPU with less than this share of its memory free:
# an engine that starts anew beside a learner would never find the default of 0.92.
# Logits are in float32, as the learner's are: rounded to bfloat16 they were 0.03 nats off, nearly all of the difference
# between the two.
_ON_GPU = {"gpu_memory_utilization": 0.01, "hf_overrides": {"head_dtype": "float32"}}


class VLLMEngine:
    """An `Engine` over `vllm.LLM`."""

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        max_context: int = 512,
        max_num_seqs: int = 128,
        kv_cache_mib: int = 512,
        seed: int = 0,
        tensor_parallel: int = 1,
        may_sleep: bool = False,
        trust: Trust = NO_TRUST,
        transport: Transport = "object_store",
        adapters: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Load the model.

        Args:
            path: a Hugging Face folder or hub name; weights in safetensors.
            dtype: `"float32"` or `"bfloat16"`; log-probabilities match the learner's to 1e-4 or to 0.4.
            max_context: prompt and response tokens of one sequence at most.
            max_num_seqs: sequences decoded at once at most.
            kv_cache_mib: memory for keys and values, MiB, of each rank.
            seed: vLLM's own seed; the responses depend on their requests' seeds alone.
            tensor_parallel: ranks that share the model; above 1 they are Ray actors in this one's placement group.
            may_sleep: whether `sleep` will be called, for which a GPU's memory is set up in another way.
            trust: which revision, and what its files may do: remote code, pickled weights.
            transport: the transport of its weights: `load_weights` takes buckets, `receive_weights` the others.
            adapters: shapes of the adapters that it is sent instead of weights (`read_adapter_shapes`); until then it
                computes without any. None: whole weights.

        Raises:
            ImportError: vLLM is not installed.
            WorkerError: vLLM cannot serve the model.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        from ppo_ray.rollout.vllm_adapters import REQUEST, engine_options
        from ppo_ray.rollout.vllm_receiver import BACKENDS, WorkerExtension

        self.policy_version = -1
        self._adapters = None if adapters is None else REQUEST
        on_gpu = torch.cuda.is_available()
        self._half_loaded = False
        try:
            self._llm: Any = vllm.LLM(
                model=path,
                dtype=dtype,
                seed=seed,
                max_model_len=max_context,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=kv_cache_mib << 20,
                enforce_eager=not on_gpu,
                enable_sleep_mode=may_sleep and on_gpu,  # on a CPU it is refused, and sleep ignored
                tensor_parallel_size=tensor_parallel,
                **({"distributed_executor_backend": "ray"} if tensor_parallel > 1 else {}),
                skip_tokenizer_init=True,
                trust_remote_code=trust.remote_code,
                revision=trust.revision,
                code_revision=trust.revision,
                load_format="ppo_ray_auto" if trust.pickles else "ppo_ray_safetensors",
                disable_log_stats=True,
                weight_transfer_config=vllm.config.WeightTransferConfig(backend=BACKENDS[transport]),
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
                # log-probabilities of the distribution that was sampled from: after the temperature
                logprobs_mode="processed_logprobs",
                **(_ON_GPU if on_gpu else {"block_size": HOST_BLOCK}),
                **({} if adapters is None else engine_options(adapters)),
            )
            if adapters is not None:
                self._llm.collective_rpc("expect_adapters", args=(adapters,))
            # what vLLM does not have on this machine it may only tell when it is asked
            first = vllm.SamplingParams(max_tokens=1, detokenize=False)
            self._llm.generate([vllm.TokensPrompt(prompt_token_ids=[0])], first, use_tqdm=False)
            self._sleep = Sleep(self._llm, may_sleep and on_gpu)
        except Exception as error:  # of vLLM's, pydantic's and torch's; their words may be pages
            raise WorkerError(f"vLLM does not start with {path!r}: {explain_start(error)}. {ADVICE}") from error
        config = self._llm.llm_engine.model_config.hf_text_config
        self._max_context = max_context
        self._vocab_size = int(config.vocab_size)
        cache = self._llm.llm_engine.vllm_config.cache_config
        self.num_cached = int(cache.num_gpu_blocks) * int(cache.block_size)
        """Tokens whose keys and values there is room for."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        """Sample one response per request, in the order of the requests; see `Engine.generate`.

        Raises:
            WorkerError: a request cannot be served, or the model's log-probabilities are not finite; see
                `check_requests` and `check_finite`.
            WorkerLost: an update broke off, so that the weights are of two policies, or they were dropped in `sleep`.
        """
        import vllm

        self._check_whole()
        self._sleep.check_weights()
        check_requests(requests, self._vocab_size, self._max_context)
        self._sleep.wake("weights", "kv_cache")
        prompts = [vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        params = [
            vllm.SamplingParams(
                temperature=sampling.temperature,
                seed=request.seed,
                max_tokens=request.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,  # what ends a response is said above, not in the model's folder
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        with self._detect_lost_ranks():
            self._llm.reset_prefix_cache()  # what was asked before must not change the last bits of what is asked now
            adapters = self._adapters if self.policy_version >= 0 else None
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        completions = [_completion(output.outputs[0]) for output in outputs]
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            check_finite(request, index, completion.logprobs)
        return completions

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Replace layer after layer as buckets come, and drop the prefix cache; see `Engine.load_weights`.

        Raises:
            WorkerLost: an earlier update broke off; no update can mend the engine.
        """
        self._update(({"tensors": tensors} for tensors in snapshot.verify_buckets()), snapshot.manifest, verified=True)

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join a NCCL group with the learner; `init_info` is of vLLM's NCCL backend, as vLLM documents it."""
        self._llm.shutdown_weight_transfer_engine()  # the group before
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def receive_weights(self, manifest: WeightManifest) -> None:
        """Receive all tensors by NCCL, verify and serve them; see `load_weights`.

        Raises:
            WorkerError: a tensor did not arrive as it was sent; the engine cannot be used afterwards.
        """
        entries = manifest.entries
        update: dict[str, Any] = {
            "names": [entry.name for entry in entries],
            "dtype_names": [entry.dtype for entry in entries],
            "shapes": [list(entry.shape) for entry in entries],
        }
        self._update([update], manifest, verified=False)

    def map_weights(self, manifest: WeightManifest, bucket: int, handles: dict[str, Any]) -> None:
        """Read one bucket by CUDA IPC; verify and serve the weights with the last. Raises as `receive_weights`.

        Args:
            manifest: what is sent.
            bucket: which of its buckets; they come in order, from 0 on.
            handles: of the learner ranks' buffers that hold it, by the UUID of their GPU.
        """
        buckets = [entries for _, entries in manifest.buckets()]
        if bucket == 0:
            self._check_whole()
            self._begin(manifest, verified=False)
        with self._detect_lost_ranks():
            self._llm.update_weights({"update_info": {"handles": handles, "entries": buckets[bucket]}})
            if bucket == len(buckets) - 1:
                self._finish(manifest)

    def _update(self, updates: Iterable[dict[str, Any]], manifest: WeightManifest, verified: bool) -> None:
        """Apply an update; nothing is changed before its first part has arrived."""
        self._check_whole()
        with self._detect_lost_ranks():
            for update in updates:
                if not self._half_loaded:
                    self._begin(manifest, verified)
                self._llm.update_weights({"update_info": update})
            self._finish(manifest)

    def _begin(self, manifest: WeightManifest, verified: bool) -> None:
        self._sleep.wake("weights")
        self._llm.collective_rpc("begin_check", args=(manifest, not verified))
        self.policy_version, self._half_loaded = -1, True
        self._llm.start_weight_update()

    def _finish(self, manifest: WeightManifest) -> None:
        self._llm.collective_rpc("end_check")
        self._llm.finish_weight_update(weight_version=str(manifest.policy_version))
        self._llm.collective_rpc("serve_adapters")
        self._sleep.end_update()
        self._sleep.wake("kv_cache")  # only now: while weights are loaded some of them are there twice
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise WorkerError(
                "vLLM did not drop its prefix cache after new weights; its answers would mix two policies"
            )
        self.policy_version, self._half_loaded = manifest.policy_version, False

    @contextlib.contextmanager
    def _detect_lost_ranks(self) -> Iterator[None]:
        """Raise the death of a tensor-parallel rank, of which vLLM makes a bare RuntimeError, as the engine's loss."""
        try:
            yield
        except RuntimeError as error:
            if getattr(self._llm.llm_engine.model_executor, "is_failed", False):
                raise WorkerLost(f"one of its tensor-parallel ranks died: {first_line(error)}") from error
            raise

    def _check_whole(self) -> None:
        if self._half_loaded:
            raise WorkerLost("its last weight update broke off: its layers are of two policies, and it cannot go back")

    def sleep(self, keep_weights: bool = True) -> None:
        """Drop the KV cache, and keep the weights in the host's memory or drop them too; see `Engine.sleep`."""
        self._sleep.begin(keep_weights or self._adapters is not None)  # no whole weights would come

    @property
    def drops_weights(self) -> bool:
        """Whether a sleep that need not keep weights drops them: after the first sync, where nothing else is lost."""
        return self._sleep.can_drop

    def close(self) -> None:
        """Free the model and its caches; another engine may be started in this process then."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()  # else Python does it some time, to the next engine
        self._llm = None
        gc.collect()


def engine_environment(gpus: float) -> dict[str, str]:
    """Return the environment of an engine that has `gpus`; 0: it computes on the CPU."""
    return ENVIRONMENT | (GPU_ENVIRONMENT if gpus else CPU_ENVIRONMENT)


def _completion(output: Any) -> Completion:
    tokens = tuple(output.token_ids)
    logprobs = tuple(entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True))
    return Completion(tokens, logprobs, "stop" if output.finish_reason == "stop" else "length")
