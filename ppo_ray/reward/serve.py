"""`ppo-ray serve-reward`: the reward of a config as a server, by the protocol of `ppo_ray.reward.http`."""

import asyncio
import hmac
import math
import socket
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from ppo_ray.config import Config, is_loopback
from ppo_ray.errors import InputError, first_line
from ppo_ray.reward.http import read_token
from ppo_ray.reward.judge import StartJudge
from ppo_ray.reward.scorer import Scorer
from ppo_ray.trajectory import weigh_parts

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
except ModuleNotFoundError as missing:
    raise InputError(f"serve-reward needs {missing.name}: pip install 'ppo-ray[serve]'") from missing

PATH = "/score"
LARGEST_REQUEST = 256 << 20
"""Bytes of a request that are read; one with more is refused."""


class Batch(BaseModel):
    """A request."""

    prompts: list[str]
    responses: list[str]
    finish_reasons: list[str] | None = None
    messages: list[list[dict[str, Any]]] | None = None
    columns: dict[str, list[Any]] = {}

    @model_validator(mode="after")
    def _check_lengths(self) -> "Batch":
        lists = {"responses": self.responses, **self.named}
        for name, items in lists.items():
            if len(items) != len(self.prompts):
                raise ValueError(f"{name} has {len(items)} items for {len(self.prompts)} prompts")
        return self

    @property
    def named(self) -> dict[str, list[Any]]:
        """What there is beside prompts and responses, by name."""
        given = {"finish_reasons": self.finish_reasons, "messages": self.messages}
        return {**self.columns, **{name: items for name, items in given.items() if items is not None}}


def make_app(config: Config, token: str | None = None, start_judge: StartJudge | None = None) -> FastAPI:
    """Load what scores, and return the application that answers with its scores, a batch at a time.

    Args:
        config: names what scores.
        token: that every request must have; None: none is asked for.
        start_judge: loads a judge; None: there is none.

    Raises:
        InputError: what scores cannot be used, is a server itself, or takes token ids, which are not sent.
    """
    for key, source in config.reward.sources:
        if source.url is not None:
            raise InputError(f"{key}.url={source.url}: is a server itself; give a classifier or a function")
    reward, scorer = config.reward, Scorer(config, start_judge)
    if "response_ids" in scorer.arguments:
        raise InputError("a reward function takes response_ids, which a server is not sent; leave that parameter out")
    app = FastAPI(title="ppo-ray serve-reward", docs_url=None, redoc_url=None, openapi_url=None)
    at_work = asyncio.Lock()

    def score_batch(batch: Batch) -> list[float | None]:
        parts = scorer.score(batch.prompts, batch.responses, lambda names: batch.named).parts
        weights = {part.name: part.weight for part in reward.parts}
        scores = weigh_parts(dict(zip(weights, parts, strict=True)), weights) if weights else parts[0]
        return [None if score is None or not math.isfinite(score) else score for score in scores]

    @app.post(PATH)
    async def score(request: Request) -> dict[str, list[float | None]]:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Content-Type must be application/json")  # a web page may not send that here
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_REQUEST:
                raise HTTPException(413, f"the request has more than {LARGEST_REQUEST >> 20} MiB")
        try:
            batch = Batch.model_validate_json(bytes(body))
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)[0]
            raise HTTPException(422, f"{'.'.join(map(str, wrong['loc'])) or 'request'}: {wrong['msg']}") from error
        if absent := sorted(scorer.arguments - batch.named.keys() - {"prompts", "responses", "prompt", "response"}):
            raise HTTPException(422, f"the reward takes {', '.join(absent)}, which the request has not")
        if not batch.prompts:
            return {"scores": []}
        try:
            await asyncio.wait_for(at_work.acquire(), reward.timeout_s)
        except TimeoutError:
            raise HTTPException(503, "another batch is being scored", {"Retry-After": "1"}) from None
        try:
            return {"scores": await run_in_threadpool(score_batch, batch)}
        except InputError as error:
            raise HTTPException(500, first_line(error)) from error
        finally:
            at_work.release()

    return app


def serve(
    config: Config,
    host: str,
    port: int,
    token_env: str | None,
    say: Callable[[str], object],
    start_judge: StartJudge | None = None,
) -> None:
    """Serve the reward of a config until a signal ends it.

    Args:
        config: names what scores.
        host: address or name to listen at.
        port: to listen at; 0: a free one.
        token_env: name of an environment variable with the token that every request must have; None: none is needed.
        say: is called with each line for people.
        start_judge: as in `make_app`.

    Raises:
        InputError: what scores cannot be used, the token is not there, or nothing can listen at that address.
    """
    try:
        token = read_token(token_env)
    except InputError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from error
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host={host} --port={port}: cannot listen there: {error}") from error
    with listener:
        app = make_app(config, token, start_judge)
        if not is_loopback(host):
            who = "everyone who reaches this port can have texts scored" if token is None else "so can the token"
            say(f"warning: --host={host}: what is sent is not encrypted and can be read on the way; {who}")
        shown = f"[{host}]" if ":" in host else host
        say(f"serving the reward at http://{shown}:{listener.getsockname()[1]}{PATH}; end it with Ctrl-C")
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(settings).run(sockets=[listener])
