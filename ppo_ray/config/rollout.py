"""The options of generation."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ppo_ray.config.sections import DType, Section, Transport

_OTHER_SAMPLING = (
    "not offered: the learner's log-probabilities are those of the full softmax, and tokens drawn from another "
    "distribution would make every ratio and every KL wrong without a sign. Leave it out; rollout.temperature, which "
    "the learner follows, makes sampling sharper"
)

MIN_VLLM_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one; 0 is greedy, which is no sampling."""


class RolloutConfig(Section):
    """Generation: how many workers, and how they sample."""

    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "top_k",
            "top_p",
            "min_p",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
            "num_beams",
            "do_sample",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "no_repeat_ngram_size",
            "logit_bias",
            "bad_words",
            "suppress_tokens",
            "length_penalty",
            "min_new_tokens",
        ),
        _OTHER_SAMPLING,
    )

    engine: Literal["vllm", "hf"] = "vllm"
    """Library that generates: vllm, or hf (transformers, slow) where vLLM cannot be installed or does not have the
    model."""
    workers: int = Field(default=1, ge=1)
    """Number of rollout actors. Each holds the whole policy and takes an equal share of the batch."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per worker. workers x threads must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker, or per rank of one (tensor_parallel); a fraction lets actors share one."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks per vLLM worker that share one copy of the policy, all on one node, each on a GPU of its own."""
    batch_size: int = Field(default=128, ge=1)
    """Responses per step, over all workers. TRL: `batch_size`."""
    min_response_tokens: int | None = Field(default=None, ge=1)
    """Smallest limit of a response, in tokens, inclusive: each response's limit is drawn from here to
    max_response_tokens. An end of sequence may still come earlier. null: all have the same limit."""
    max_response_tokens: int = Field(default=256, ge=1)
    """Largest limit of a response, in tokens, INCLUSIVE (TRL's `LengthSampler(4, 16)` never draws 16)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of sampling, from the full softmax. The learner's log-probabilities are taken at the same
    temperature. vLLM samples at 0.01 or more."""
    stop_at_eos: bool = True
    """Effect of an end-of-sequence token: the tokenizer's, and each `eos_token_id` of the model's
    generation_config.json. true: it ends a response; false: every response has its full length."""
    stop_token_ids: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Further tokens that end a response, by their ids; also with stop_at_eos=false."""
    max_context: int | None = Field(default=None, ge=2)
    """Longest prompt plus response that an engine has room for, in tokens; null: prompts.max_tokens +
    rollout.max_response_tokens."""
    kv_cache_mib: int = Field(default=512, ge=1)
    """Memory of each vLLM engine for keys and values, MiB."""
    dtype: DType = "float32"
    """Precision of the engines' weights. bfloat16 is faster on GPUs; log-probabilities are then up to 0.4 off the
    learner's."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """Number of updates by which the policy that samples may be old. 0: the engines wait for each update. 1: they
    sample the next batch while the learner works on this one; the batch is then of the policy before the last update,
    which `ppo.importance_cap` (required) corrects. See docs/internals.md."""
    weight_transport: Literal["auto", Transport] = "auto"
    """Way of new weights to the engines: through Ray's object store, by NCCL from GPU to GPU, or by CUDA IPC where they
    share one; auto: the fastest of them that fits (docs/internals.md). All are verified and acknowledged alike."""
    wire_dtype: Literal["bfloat16"] | None = None
    """Precision that weights are rounded to on their way; bfloat16 halves the bytes. Engines then compute with rounded
    weights, also in float32, and `mismatch/*` grows; with dtype=bfloat16 they round them anyway, and nothing is lost.
    null: no rounding."""
    weight_bucket_mib: int = Field(default=256, ge=1)
    """Largest piece that weights travel in, MiB; a tensor that is larger has one of its own."""
    self_check: bool = True
    """Check before the first step that new weights change what each engine computes as they change the learner; it
    costs two weight syncs."""
