"""The options of scoring: one reward, or a weighted sum of several."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field

from ppo_ray.config.file import Contradiction
from ppo_ray.config.sections import DType, ModelSource, Source

_KINDS = {"path": "a classifier", "function": "a Python function", "url": "a server", "judge": "a judge"}
"""The options of a source that name what scores; each has one of them."""


def _check_url(url: str) -> str:
    """Refuse what is no address of a server; the message does not show it, for it may hold a password."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.fragment
    except ValueError:  # a port that is no number, half an IPv6 address
        right = False
    if not right or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("must be the address of a server, e.g. https://judge.example.org:8000/score")
    if "@" in parts.netloc or parts.query:
        raise ValueError("holds a user, password or query, which would be written into config.yaml; use token_env")
    return url


def _check_variable(name: str) -> str:
    """Refuse what is no variable's name; the message does not show it, for it may be the token itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable, e.g. JUDGE_TOKEN, not the token itself")
    return name


def is_loopback(host: str) -> bool:
    """Say whether what is sent to a host stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_pattern(pattern: str) -> str:
    """Refuse what is no regular expression with one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups in parentheses; it must have one, around the verdict")
    return pattern


class JudgeConfig(ModelSource):
    """A language model that is asked about each response."""

    path: Source
    """Folder or hub name of a causal LM with its tokenizer, weights in safetensors. Required."""
    prompt: str = Field(min_length=1)
    """Path of a file with the question: a text in which {prompt}, {response} and the columns of `prompts.keep`, each in
    braces, stand for themselves. It is the user's message to the judge. Required."""
    pattern: Annotated[str, AfterValidator(_check_pattern)]
    """Regular expression with one group, which is the verdict, e.g. 'Verdict: (\\d+)'. The last place of the answer
    where it matches counts; an answer without any leaves the response without a score. Required."""
    scores: dict[str, float] = Field(default={})
    """The score of each verdict, e.g. {yes: 1, no: 0}; others are no scores. Empty: the verdict is a number itself."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer, tokens."""
    max_context: int = Field(default=2048, ge=2)
    """Longest question with its answer, tokens; a response whose question is longer has no score."""
    temperature: float = Field(default=0.0, ge=0)
    """Of sampling the answer. 0: the likeliest token each time. The same question always has the same answer."""
    engine: Literal["vllm", "hf"] = "vllm"
    """What runs the judge: vLLM, or transformers, which is slower and takes any model."""
    dtype: DType = "float32"
    """That the judge computes in."""
    kv_cache_mib: int = Field(default=512, ge=1)
    """Memory of vLLM for the judge's keys and values, MiB."""


class RewardSource(ModelSource):
    """One thing that scores: a classifier, a Python function, a server or a judge."""

    path: Source | None = None
    """Folder or hub name of a sequence classifier with its tokenizer, weights in safetensors. It scores prompt plus
    response. TRL: `reward_model`."""
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    """A Python function instead, as "package.module:function". It gets a list for each parameter, by its name: prompts,
    responses, messages, response_ids, finish_reasons, and the columns of `prompts.keep`. It returns a score (or None)
    per response. An `async def` gets one response's values instead."""
    url: Annotated[str, AfterValidator(_check_url)] | None = None
    """Address of a server instead, http:// or https://, that is sent each batch's texts as JSON and answers with their
    scores; docs/own_task.md has the form. `ppo-ray serve-reward` is such a server."""
    judge: JudgeConfig | None = None
    """A language model instead that is asked about each response: {path, prompt, pattern, scores, max_tokens,
    max_context, temperature, engine, dtype, kv_cache_mib}. docs/own_task.md has an example."""
    token_env: Annotated[str, AfterValidator(_check_variable)] | None = None
    """Name of an environment variable, on the machines of the reward workers, with a token for the server: it goes as
    `Authorization: Bearer ...`. The token itself is never written or shown."""
    label: str = "POSITIVE"
    """Name of the classifier's label whose output is the score."""
    transform: Literal["logit", "softmax", "sigmoid"] = "logit"
    """Function that makes a score of the classifier's outputs: the label's raw output (logit), its probability
    (softmax), or its own sigmoid."""
    dtype: DType = "float32"
    """Precision that the classifier computes in."""
    chat_template: str = Field(default="none", min_length=1)
    """What the classifier reads. none: prompt and response, one behind the other. tokenizer: what its own chat template
    makes of the prompt's messages and the response as the assistant's. Else the path of a file with a template."""
    batch_size: int = Field(default=32, ge=1)
    """Largest number of texts per forward pass of the classifier."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens per forward pass of the classifier, padding included; a longer text has one of its own. null: as many
    as batch_size texts have."""

    @property
    def address(self) -> SplitResult:
        """The parts of `url`."""
        return urlsplit(self.url or "")


class RewardPart(RewardSource):
    """One of several things that are scored."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """Name of the part in the metrics and in `trajectories/`. Required."""
    weight: float = 1.0
    """Factor that its score is multiplied by."""


class RewardConfig(RewardSource):
    """What scores a response: a classifier (`path`), a `function`, a server (`url`), a `judge` or several `parts`."""

    parts: Annotated[tuple[RewardPart, ...], Field(strict=False)] = ()
    """Several rewards instead of one: a list of {name, weight, function, path, url or judge, ...} with the options of
    this section from `path` to `batch_tokens`. The score is the weighted sum. A part without a score is left out of it;
    a response without any has none. The metrics have each part, `trajectories/` its score before the weight."""
    max_concurrent: int = Field(default=64, ge=1)
    """Largest number of calls of an `async def` function at a time, per worker."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit for a call of an `async def` function, seconds; after it the response has no score. For a server:
    longest silence. A batch waits at most (retries + 1) times this for its scores; then it has none."""
    retries: int = Field(default=3, ge=0, le=100)
    """Number of times that a batch is sent again to a server that does not answer, or answers 429, 500, 502, 503 or
    504."""
    workers: int = Field(default=1, ge=1)
    """Number of reward actors. Each scores the shards it is given."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per worker. workers x threads must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker; a fraction lets actors share one."""
    max_unscored_steps: int = Field(default=3, ge=0)
    """Largest number of steps in a row without any score. Nothing is learnt in such a step. One step more ends the run,
    and the steps that were made are saved. 0: the first such step ends it."""

    @property
    def sources(self) -> tuple[tuple[str, RewardSource], ...]:
        """All that scores, each with the key of its options, e.g. `reward.parts[0]`."""
        parts = tuple((f"reward.parts[{index}]", part) for index, part in enumerate(self.parts))
        return parts or (("reward", self),)


def reward_contradictions(reward: RewardConfig) -> Iterator[Contradiction]:
    """Yield the contradictions of what scores."""
    kinds = tuple(f"reward.{kind}" for kind in _KINDS)
    if reward.parts and any(getattr(reward, kind) is not None for kind in (*_KINDS, "token_env")):
        yield Contradiction(
            ("reward.parts", *kinds, "reward.token_env"),
            "stands instead of reward.path, reward.function, reward.url and reward.judge: name these as further parts, "
            "or leave parts out",
        )
        return
    for key, source in reward.sources:
        given = [kind for kind in _KINDS if getattr(source, kind) is not None]
        if len(given) != 1:
            *others, last = (f"{key}.{kind} ({meaning})" for kind, meaning in _KINDS.items())
            yield Contradiction(
                ("reward.parts",) if reward.parts else kinds,
                f"give {', '.join(others)} or {last}, " + ("not several" if given else "one of them"),
            )
        elif source.judge is not None and source.judge.max_tokens >= source.judge.max_context:
            yield Contradiction(
                ("reward.parts",) if reward.parts else ("reward.judge",),
                f"{key}.judge.max_tokens={source.judge.max_tokens} leaves no room for the question in "
                f"max_context={source.judge.max_context}",
            )
        elif source.token_env is not None and source.url is None:
            yield Contradiction(
                ("reward.parts",) if reward.parts else ("reward.token_env", "reward.url"),
                f"{key}.token_env is for {key}.url; give that too, or leave it out",
            )
    names = [part.name for part in reward.parts]
    if len(set(names)) < len(names):
        yield Contradiction(("reward.parts",), f"{', '.join(names)}: two parts have one name")
