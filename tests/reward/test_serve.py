"""`ppo-ray serve-reward`, asked by the client that training uses, and by requests that are wrong."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ppo_ray.config import Config, RewardSource, load_config
from ppo_ray.errors import InputError
from ppo_ray.reward import serve
from ppo_ray.reward.classifier import Classifier
from ppo_ray.reward.http import RewardServer
from ppo_ray.reward.serve import PATH, make_app


def score_all(responses: list[str], answer: list[int], finish_reasons: list[str], messages: list[Any]) -> list[Any]:
    rows = zip(responses, answer, finish_reasons, messages, strict=True)
    return [None if text == "none" else len(text) + n + (end == "stop") + len(chat) for text, n, end, chat in rows]


def score_ids(response_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in response_ids]


def score_wrongly(responses: list[str]) -> list[float]:
    return [0.5]


def score_endlessly(responses: list[str]) -> list[float]:
    return [float("inf") for _ in responses]


def configured(*reward: str) -> Config:
    return load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", "prompts.keep=[a.answer]", *reward])


def ask(client: TestClient, **request: Any) -> Any:
    return client.post(PATH, json=request)


FUNCTION = f"reward.function={__name__}:score_all"
RIGHT = {
    "prompts": ["p", "q"],
    "responses": ["four", "none"],
    "finish_reasons": ["stop", "length"],
    "messages": [[{"role": "user", "content": "c"}], []],
    "columns": {"answer": [10, 20], "other": [None, None]},
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app(configured(FUNCTION))) as client:
        yield client


def test_a_function_gets_what_is_sent(client: TestClient) -> None:
    assert ask(client, **RIGHT).json() == {"scores": [4 + 10 + 1 + 1, None]}
    empty = {"prompts": [], "responses": [], "finish_reasons": [], "messages": [], "columns": {"answer": []}}
    assert ask(client, **empty).json() == {"scores": []}


def test_parts_are_weighed_as_in_training(tiny_classifier: Path) -> None:
    parts = [
        {"name": "all", "function": f"{__name__}:score_all", "weight": 0.5},
        {"name": "taste", "path": str(tiny_classifier), "weight": -2},
    ]
    taste = Classifier(str(tiny_classifier)).score(["pfour", "qnone"])
    assert all(score is not None for score in taste)
    scores = ask(TestClient(make_app(configured(f"reward.parts={parts}"))), **RIGHT).json()["scores"]
    assert scores == pytest.approx([0.5 * 16 - 2 * taste[0], -2 * taste[1]], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"responses": ["one"]}, 422, "responses has 1 items for 2 prompts"),
        ({"columns": {"answer": [1]}}, 422, "answer has 1 items for 2 prompts"),
        ({"columns": {}}, 422, "the reward takes answer, which the request has not"),
        ({"messages": None}, 422, "the reward takes messages, which"),
        ({"prompts": "pq"}, 422, "prompts: "),
        ({"responses": ["a", None]}, 422, "responses.1: "),
    ],
)
def test_what_is_wrong_with_a_request_is_said(client: TestClient, change: Any, status: int, why: str) -> None:
    answer = ask(client, **{**RIGHT, **change})
    assert answer.status_code == status and why in answer.json()["detail"]


def test_only_json_of_a_bounded_size_is_read(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "LARGEST_REQUEST", 1000)
    kind = {"Content-Type": "application/json"}
    assert client.post(PATH, content=b" " * 1001, headers=kind).status_code == 413
    assert client.post(PATH, content=b"{", headers=kind).status_code == 422
    assert client.post(PATH, content=json.dumps(RIGHT), headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.get("/openapi.json").status_code == client.get("/docs").status_code == 404


def test_a_token_must_be_the_right_one() -> None:
    client = TestClient(make_app(configured(FUNCTION), "right"))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
        answer = client.post(PATH, json=RIGHT, headers=header)
        assert answer.status_code == 401 and "scores" not in answer.text
    assert client.post(PATH, json=RIGHT, headers={"Authorization": "Bearer right"}).status_code == 200


def test_a_function_that_is_wrong_is_an_error_of_the_server() -> None:
    client = TestClient(make_app(configured(f"reward.function={__name__}:score_wrongly")))
    answer = ask(client, prompts=["a", "b"], responses=["a", "b"])
    assert answer.status_code == 500 and "returned 1 scores for 2 texts" in answer.json()["detail"]
    assert ask(client, prompts=["a"], responses=["a"]).json() == {"scores": [0.5]}  # the next one is not held up


def test_a_score_that_is_not_finite_is_null() -> None:
    client = TestClient(make_app(configured(f"reward.function={__name__}:score_endlessly")))
    assert ask(client, prompts=["a"], responses=["a"]).json() == {"scores": [None]}


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(InputError, match="takes response_ids, which a server is not sent"):
        make_app(configured(f"reward.function={__name__}:score_ids"))
    with pytest.raises(InputError, match="is a server itself"):
        make_app(configured("reward.url=http://127.0.0.1:1/"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--host=127.0.0.1 --port={port}: cannot listen there"):
            serve.serve(configured(FUNCTION), "127.0.0.1", port, None, print)
    with pytest.raises(InputError, match="--token-env=NO_SUCH_TOKEN"):
        serve.serve(configured(FUNCTION), "127.0.0.1", 0, "NO_SUCH_TOKEN", print)


@pytest.mark.parametrize(
    ("host", "token", "warned"),
    [
        ("127.0.0.1", None, ""),
        ("::1", None, ""),
        ("0.0.0.0", None, "everyone"),
        ("0.0.0.0", "TOKEN_OF_TEST", "so can the token"),
    ],
)
def test_another_host_than_loopback_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, host: str, token: str | None, warned: str
) -> None:
    said: list[str] = []
    monkeypatch.setenv("TOKEN_OF_TEST", "right")
    monkeypatch.setattr(serve.uvicorn.Server, "run", lambda self, sockets: said.append(sockets[0].getsockname()[0]))
    try:
        serve.serve(configured(FUNCTION), host, 0, token, said.append)
    except InputError:
        pytest.skip("no IPv6 here") if ":" in host else pytest.fail("cannot listen")
    *warnings, serving, address = said
    assert address == host and serving.startswith("serving the reward at http://") and "right" not in serving
    assert len(warnings) == bool(warned) and all(warned in line and "not encrypted" in line for line in warnings)


@pytest.mark.slow
def test_the_command_serves_the_client_until_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text(
        "output_dir: x\nmodel: {path: m}\nprompts: {path: p}\nreward: {function: 'own:score'}"
    )
    (tmp_path / "own.py").write_text("def score(responses): return [len(text) for text in responses]")
    monkeypatch.setenv("SERVED_TOKEN", "right")
    root = str(Path(__file__).parents[2])
    server = subprocess.Popen(
        [sys.executable, "-m", "ppo_ray", "serve-reward", "c.yaml", "--port", "0", "--token-env", "SERVED_TOKEN"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        url = line.partition(" at ")[2].partition(";")[0]
        client = RewardServer(RewardSource(url=url, token_env="SERVED_TOKEN"))
        assert client.score(["p", "q"], ["one", "three"], {"finish_reasons": ["stop", "stop"]}) == [3.0, 5.0]
        stranger = RewardServer(RewardSource(url=url))
        assert stranger.score(["p"], ["one"]) == [None]
        assert "it answered 401 Unauthorized" in (stranger.failure or "")
    finally:
        server.terminate()
        server.wait(30)
