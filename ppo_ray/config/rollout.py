"""The options of generation."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ppo_ray.config.file import Contradiction
from ppo_ray.config.sections import DType, Section, Transport

_OTHER_SAMPLING = (
    "not offered: the learner's log-probabilities are those of the full softmax, and tokens drawn from another "
    "distribution would make every ratio and every KL wrong without a sign. Leave it out; rollout.temperature, which "
    "the learner follows, makes sampling sharper"
)

MIN_VLLM_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one; 0 is greedy, which is no sampling."""


_FEWEST_SEQS, _MOST_SEQS = 128, 1024  # vLLM's own default on a large GPU is 1024


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
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt, a group. It must divide batch_size, which counts responses: a step has batch_size /
    responses_per_prompt prompts. A group is sampled by one worker, which computes its prompt once."""
    flat_groups: Literal["keep", "drop", "refill"] = "keep"
    """What becomes of a group whose scores are all equal, as the reward gave them. keep: it is learned from, though its
    advantages may all be 0. drop: it is left out of the update. refill: further prompts are taken in its place (DAPO's
    dynamic sampling), and it is left out."""
    max_refills: int = Field(default=10, ge=1)
    """Largest number of times in a step that flat_groups=refill takes further prompts; then the step learns from the
    groups that it has."""
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
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Largest number of sequences that a vLLM engine decodes at once; null: its share of a batch, from 128 to 1024."""
    kv_cache_mib: int | None = Field(default=None, ge=1)
    """Memory of each vLLM engine, or of each of its ranks, for keys and values, MiB. null: what the engine's share of a
    batch needs, from 64 to 512 on a CPU, as far as there is room on a GPU. `ppo-ray plan` shows it."""
    dtype: DType | None = None
    """Precision of the engines' weights. null: bfloat16 on GPUs, float32 on CPUs. With bfloat16 log-probabilities are
    up to 0.4 off the learner's. float32 on a GPU is several times slower."""
    batch_invariant: bool = False
    """Whether vLLM on a GPU takes kernels whose results do not depend on the rest of the batch; they are slower.
    Without them a repeated or resumed generation on GPUs may sample other responses. On CPUs float32 does not need
    them."""
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
    adapter_sync: Literal["auto", "merged", "adapter"] = "auto"
    """What engines get of a policy with adapters (model.lora). merged: whole weights, the adapters merged into them,
    with which engines generate at full speed. adapter: the adapters alone, which engines add to the weights of
    model.path; vLLM is many times slower with them on a CPU. auto: adapter where vLLM has GPUs and serves adapters of
    this kind of model, else merged. See docs/lora.md."""
    self_check: bool = True
    """Check before the first step that new weights change what each engine computes as they change the learner; it
    costs two weight syncs."""

    @property
    def engine_dtype(self) -> DType:
        """Dtype of the engines' weights."""
        return self.dtype or ("bfloat16" if self.gpus else "float32")

    @property
    def num_prompts(self) -> int:
        """Prompts per step."""
        return self.batch_size // self.responses_per_prompt

    @property
    def share(self) -> int:
        """Largest number of a step's responses that one engine samples; groups stay whole."""
        return -(-self.num_prompts // self.workers) * self.responses_per_prompt

    @property
    def num_decoded(self) -> int:
        """Largest number of sequences that a vLLM engine decodes at once."""
        return self.max_num_seqs or min(max(self.share, _FEWEST_SEQS), _MOST_SEQS)


def group_contradictions(rollout: RolloutConfig) -> Iterator[Contradiction]:
    """Yield what does not go with groups whose scores are all equal."""
    if rollout.flat_groups != "keep" and rollout.responses_per_prompt < 2:
        yield Contradiction(
            ("rollout.flat_groups", "rollout.responses_per_prompt"),
            f"{rollout.flat_groups} would leave out every response: with one to a prompt all scores of a group are "
            "equal; set rollout.responses_per_prompt to 2 or more, or keep",
        )
    if rollout.flat_groups == "refill" and rollout.max_staleness:
        yield Contradiction(
            ("rollout.flat_groups", "rollout.max_staleness"),
            "refill samples until the batch is full, and with rollout.max_staleness=1 the engines are a step ahead: "
            "set drop, or max_staleness=0",
        )


def engine_contradictions(rollout: RolloutConfig) -> Iterator[Contradiction]:
    """Yield what `rollout.engine` cannot do."""
    if rollout.engine == "vllm" and rollout.temperature < MIN_VLLM_TEMPERATURE:
        yield Contradiction(
            ("rollout.temperature", "rollout.engine"),
            f"{rollout.temperature:g} is below {MIN_VLLM_TEMPERATURE}, the lowest at which rollout.engine=vllm samples "
            f"(it would take {MIN_VLLM_TEMPERATURE} instead); set {MIN_VLLM_TEMPERATURE} or more, or rollout.engine=hf",
        )
    if rollout.adapter_sync == "adapter" and rollout.engine == "vllm" and rollout.gpus and rollout.dtype == "float32":
        yield Contradiction(
            ("rollout.adapter_sync", "rollout.dtype"),
            "adapter: on a GPU vLLM's kernels for adapters take bfloat16 alone; set rollout.adapter_sync=merged, or "
            "leave rollout.dtype out",
        )
    if rollout.batch_invariant and not (rollout.engine == "vllm" and rollout.gpus):
        yield Contradiction(
            ("rollout.batch_invariant", "rollout.engine", "rollout.gpus"),
            f"true chooses kernels of vLLM on GPUs, but rollout.engine={rollout.engine} and rollout.gpus="
            f"{rollout.gpus:g}; leave it out: on CPUs float32 does not depend on the batch",
        )
