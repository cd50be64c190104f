"""A reward over HTTP: a server of the user's own, or `ppo-ray serve-reward`, is sent each batch as JSON.

The request is `{"prompts": [...], "responses": [...], "finish_reasons": [...], "columns": {name: [...]}}`, and
`messages` where prompts are conversations; each list has an item per response. The answer is `{"scores": [...]}`, a
number or null per response.
"""

import json
import logging
import math
import os
import queue
import re
import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from ppo_ray.config import Config, RewardSource, is_loopback
from ppo_ray.errors import QUOTED, InputError, first_line

_LOG = logging.getLogger(__name__)

LARGEST_ANSWER = 16 << 20
"""Bytes of an answer that are read; one with more is refused."""
RETRIED = (429, 500, 502, 503, 504)
"""Answers after which a batch is sent again."""
FIRST_PAUSE_S = 0.5
"""The pause before the second time that a batch is sent again is twice this, and doubles from then on."""
_RESERVED = {
    "prompt",
    "prompts",
    "response",
    "responses",
    "response_ids",
    "finish_reason",
    "finish_reasons",
    "messages",
}


def read_token(name: str | None) -> str | None:
    """Return the token that an environment variable holds; None: there is no variable to read.

    Raises:
        InputError: the variable is not set, or holds what cannot be sent; the message does not show it.
    """
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if not token:
        raise InputError(f"token_env={name}: this environment variable is not set, or empty; export it")
    if not re.fullmatch(r"[!-~]+", token):
        raise InputError(f"token_env={name}: its value cannot be sent as a token: it has spaces or special characters")
    return token


def encode(request: Mapping[str, Any]) -> bytes:
    """Write a request as JSON.

    Raises:
        InputError: it holds what JSON has no word for: bytes, dates, numbers that are not finite.
    """
    try:
        return json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"a server is sent JSON, which cannot hold a value of the kept columns: {error}") from error


def server_problems(config: Config, key: str, source: RewardSource, kept: Iterable[Any]) -> Iterator[str]:
    """Yield what keeps a server from being asked; whether it answers is known at the first batch.

    Args:
        config: whose reward it is.
        key: of the source's options, e.g. `reward.parts[0]`.
        source: names the server.
        kept: the columns of `prompts.keep`, as tables of some rows each.
    """
    reward = config.reward
    try:
        RewardServer(source, config.prompts.kept_names)
        for table in kept:
            encode(table.to_pydict())
    except InputError as error:
        yield f"{key}.url={source.url}: {error}"
    if (reward.retries + 1) * reward.timeout_s >= config.ray.call_timeout_s:
        yield (
            f"{key}.url={source.url}: a batch waits for (reward.retries={reward.retries} + 1) x reward.timeout_s="
            f"{reward.timeout_s:g} seconds at most, and a worker at work longer than ray.call_timeout_s="
            f"{config.ray.call_timeout_s:g} is taken for dead; lower the first or raise the last"
        )


def describe_exposure(key: str, source: RewardSource) -> Iterator[str]:
    """Yield a warning where texts cross a network in clear."""
    if source.address.scheme == "http" and not is_loopback(source.address.hostname or ""):
        what = "texts" if source.token_env is None else "texts and the token"
        yield f"warning: {key}.url={source.url} is not encrypted: {what} can be read on the way; use https, or a tunnel"


class RewardServer:
    """A server that scores batches.

    What goes wrong with a batch leaves it without scores, and is the `failure`.
    """

    def __init__(
        self,
        source: RewardSource,
        columns: Collection[str] = (),
        *,
        key: str = "reward",
        retries: int = 3,
        timeout_s: float = 60.0,
    ) -> None:
        """Read the token; nothing is sent.

        Args:
            source: names the server.
            columns: names of the kept columns.
            key: of the source's options, e.g. `reward.parts[0]`, for messages.
            retries: how often a batch is sent again.
            timeout_s: longest silence of the server, seconds. A batch waits for (retries + 1) times this at most.

        Raises:
            InputError: the token is not there, or a column has the name of something else that is sent.
        """
        if same := _RESERVED.intersection(columns):
            raise InputError(
                f"prompts.keep: {min(same)} is the name of something else that a server is sent; rename it"
            )
        self._url, self._token = str(source.url), read_token(source.token_env)
        self._option = f"{key}.url={self._url}"
        self._is_here = is_loopback(source.address.hostname or "")
        self._retries, self._timeout_s = retries, timeout_s
        self.arguments = ("finish_reasons", "messages", *columns)
        """Names of the values that it is sent beside prompts and responses, where there are such."""
        self._columns = tuple(columns)
        self.failure: str | None = None
        """Why the first response without a score in the last `score` has none; None: every one has one."""

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] = types.MappingProxyType({}),
    ) -> list[float | None]:
        """Return the server's scores; None for each response where something goes wrong.

        Args:
            prompts: texts.
            responses: texts.
            columns: what else there is of each response, a sequence per name.

        Raises:
            InputError: a kept column holds what JSON cannot.
        """
        self.failure = None
        body = {"prompts": prompts, "responses": responses}
        body |= {name: columns[name] for name in ("messages", "finish_reasons") if name in columns}
        sent = encode({**body, "columns": {name: columns[name] for name in self._columns}})
        try:
            scores = _read_scores(self._ask(sent), len(prompts))
        except (OSError, HTTPError, ValueError) as error:  # those of requests are OSError
            self.failure = f"{self._option}: the batch has no scores: {self._describe(error)}"
            _LOG.warning(self.failure)
            return [None] * len(prompts)
        if None in scores:
            response = responses[scores.index(None)][:QUOTED]
            self.failure = f"{self._option}: the server has no score for the response {response!r}"
        return scores

    def _ask(self, body: bytes) -> bytes:
        """Send a batch from a thread, so that neither a name server nor a trickle of bytes can hold the worker up."""
        answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def post() -> None:
            try:
                answers.put(self._post(body))
            except Exception as error:  # raised again where it is waited for
                answers.put(error)

        threading.Thread(target=post, name="reward-server", daemon=True).start()
        limit = (self._retries + 1) * self._timeout_s
        try:
            answer = answers.get(timeout=limit)
        except queue.Empty:
            raise ValueError(
                f"there was no whole answer within {limit:g} s (reward.timeout_s={self._timeout_s:g}, "
                f"reward.retries={self._retries})"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _post(self, body: bytes) -> bytes:
        retry = Retry(
            self._retries,
            allowed_methods={"POST"},
            status_forcelist=RETRIED,
            backoff_factor=FIRST_PAUSE_S,
            backoff_max=self._timeout_s,
            retry_after_max=math.ceil(self._timeout_s),
            raise_on_status=False,
        )
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            with session.post(
                self._url,
                data=body,
                headers={"Content-Type": "application/json", "Accept": "application/json"},
                auth=self._authorize,
                timeout=self._timeout_s,
                allow_redirects=False,
                stream=True,
                proxies={"no_proxy": "*"} if self._is_here else None,
            ) as answer:
                content = bytearray()
                for chunk in answer.iter_content(1 << 16):
                    content += chunk
                    if len(content) > LARGEST_ANSWER:
                        raise ValueError(f"its answer has more than {LARGEST_ANSWER >> 20} MiB")
                if answer.is_redirect:
                    raise ValueError("it answers with another address, which is not followed; give that one")
                if answer.status_code != 200:
                    said = bytes(content[:QUOTED]).decode("utf-8", "replace")
                    raise ValueError(f"it answered {answer.status_code} {answer.reason}: {said!r}")
                return bytes(content)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token, and nothing else: without this requests would send what ~/.netrc has for the host."""
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _describe(self, error: Exception) -> str:
        """Return an error's message without the token."""
        if isinstance(error, OSError | HTTPError):
            cause = getattr(error.args[0], "reason", error) if error.args else error  # urllib3's own
            error = cause if isinstance(cause, Exception) else error
            text = f"{type(error).__name__}: {first_line(error)}"
            text += f" (reward.timeout_s={self._timeout_s:g}, reward.retries={self._retries})"
        else:
            text = first_line(error)
        return text.replace(self._token, "...") if self._token else text


def _read_scores(answer: bytes, expected: int) -> list[float | None]:
    """Return the scores of an answer; None for one that is not finite.

    Raises:
        ValueError: it is not what the protocol says.
    """
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = answer[:QUOTED].decode("utf-8", "replace")
        raise ValueError(f'its answer {said!r} is not of the form {{"scores": [number or null, ...]}}') from None
    if not isinstance(scores, list) or len(scores) != expected:
        found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise ValueError(f"its answer has {found} for {expected} responses")
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"its answer has the score {repr(score)[:QUOTED]}, neither a number nor null")
    return [None if score is None or not _is_finite(score) else float(score) for score in scores]


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond every float
        return False
