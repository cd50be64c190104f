"""A reward over HTTP, against a real server on loopback that answers rightly, wrongly, late, or not at all."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from ppo_ray import trajectory
from ppo_ray.config import RewardSource, load_config
from ppo_ray.errors import InputError
from ppo_ray.reward import http
from ppo_ray.reward.actor import RewardWorker
from ppo_ray.reward.http import RewardServer
from tests.test_trajectory import row

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Keeps the requests it got, and answers each by the next of its answers; by the last one from then on."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[Answer] = []
        self.released = threading.Event()
        keeper = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                keeper.headers.append({name.lower(): value for name, value in self.headers.items()})
                keeper.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answers = keeper.answers
                (answers.pop(0) if len(answers) > 1 else answers[0])(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # loopback is asked directly
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server = Server()
    threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.released.set()
    server.server.shutdown()
    server.server.server_close()


def say(body: str | bytes, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = body.encode() if isinstance(body, str) else body
        handler.send_response(status)
        for name, value in {"Content-Length": str(length or len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def client(server: Server, columns: tuple[str, ...] = (), timeout_s: float = 30.0, **source: Any) -> RewardServer:
    return RewardServer(RewardSource(url=server.url, **source), columns, retries=2, timeout_s=timeout_s)


TWO = (["a", "b"], ["x", "y"])


def test_a_worker_sends_what_there_is_of_each_response_and_takes_the_scores(server: Server) -> None:
    server.answers = [say('{"scores": [1.5, null], "more": 1}')]
    worker = RewardWorker.__ray_metadata__.modified_class("reward-0")
    options = [f"reward.url={server.url}", "output_dir=x", "model.path=m", "prompts.path=p", "prompts.keep=[a.right]"]
    worker.setup(load_config(None, options))
    row_column = pa.StructArray.from_arrays([pa.array([{"n": [1]}, None])], names=["right"])
    chats = [[{"role": "user", "content": "hé"}], []]
    extras = pa.table({"messages": [json.dumps(chat) for chat in chats], "row": row_column})
    rows = [row(0), row(1)]
    scored, _ = worker.score(trajectory.from_rows(rows, extras))
    assert scored.column("score").to_pylist() == [1.5, None]
    assert server.requests == [
        {
            "prompts": [each["prompt"] for each in rows],
            "responses": [each["response"] for each in rows],
            "messages": chats,
            "finish_reasons": [each["finish_reason"] for each in rows],
            "columns": {"right": [{"n": [1]}, None]},
        }
    ]
    assert "authorization" not in server.headers[0]
    assert worker.explain() == (
        f"reward.url={server.url}: the server has no score for the response {rows[1]['response']!r}"
    )


def test_texts_have_no_messages_to_send(server: Server) -> None:
    server.answers = [say('{"scores": [2]}'), say('{"scores": [null]}')]
    worker = RewardWorker.__ray_metadata__.modified_class("reward-0")
    parts = [{"name": "judge", "url": server.url, "weight": -0.5}]
    worker.setup(load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", f"reward.parts={parts}"]))
    scored, _ = worker.score(trajectory.from_rows([row(0)]))
    assert scored.column("score").to_pylist() == [-1.0] and scored.column("parts").to_pylist() == [{"judge": 2.0}]
    assert server.requests[0].keys() == {"prompts", "responses", "finish_reasons", "columns"}
    worker.score(trajectory.from_rows([row(0)]))
    assert worker.explain().startswith(f"reward.parts[0].url={server.url}: the server has no score for the response ")


def test_a_batch_is_sent_again_after_an_error_of_the_server(server: Server) -> None:
    server.answers = [say("", 500), say("", 503), say('{"scores": [1, -2e3]}')]
    scorer = client(server)
    assert scorer.score(*TWO) == [1.0, -2000.0] and scorer.failure is None
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]


def die(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def test_a_batch_is_sent_again_to_a_server_that_died_before_it_answered(server: Server) -> None:
    server.answers = [die, say('{"scores": [1, 2]}')]
    assert client(server).score(*TWO) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "tries", "why"),
    [
        (say("out of\x1bmemory", 500), 3, r"it answered 500 Internal Server Error: 'out of\x1bmemory'"),
        (say("", 429, **{"Retry-After": "0"}), 3, "it answered 429"),
        (say("no such page", 404), 1, "it answered 404 Not Found: 'no such page'"),
        (say("", 201), 1, "it answered 201"),
        (say("", 307, Location="http://127.0.0.1:9/other"), 1, "another address, which is not followed"),
        (die, 3, "RemoteDisconnected"),
        (say('{"scores": [1, 2', length=100), 1, "IncompleteRead"),
        (say("<html>"), 1, "its answer '<html>' is not of the form"),
        (say(b"\xff\xfe"), 1, "is not of the form"),
        (say("[" * 100_000), 1, "is not of the form"),
        (say('{"score": [1, 2]}'), 1, "is not of the form"),
        (say("[1, 2]"), 1, "is not of the form"),
        (say('{"scores": [1]}'), 1, "its answer has 1 scores for 2 responses"),
        (say('{"scores": {"a": 1}}'), 1, "its answer has no list of scores for 2 responses"),
        (say('{"scores": [1, "2"]}'), 1, "has the score '2', neither a number nor null"),
        (say('{"scores": [1, true]}'), 1, "has the score True, neither"),
        (say(b" " * (http.LARGEST_ANSWER + 1)), 1, "its answer has more than 16 MiB"),
    ],
)
def test_what_goes_wrong_leaves_the_batch_without_scores_and_is_said(
    server: Server, answer: Answer, tries: int, why: str
) -> None:
    server.answers = [answer]
    scorer = client(server)
    assert scorer.score(*TWO) == [None, None]
    assert scorer.failure is not None and why in scorer.failure, scorer.failure
    assert scorer.failure.startswith(f"reward.url={server.url}: the batch has no scores: ")
    assert len(server.requests) == tries
    server.answers = [say('{"scores": [1, 2]}')]
    assert scorer.score(*TWO) == [1.0, 2.0] and scorer.failure is None


def test_scores_that_are_not_finite_are_none(server: Server) -> None:
    server.answers = [say('{"scores": [NaN, 1e999, 1%s, 4]}' % ("0" * 400))]
    scorer = client(server)
    assert scorer.score(["a"] * 4, ["x"] * 4) == [None, None, None, 4.0]
    assert scorer.failure is not None and "no score for the response 'x'" in scorer.failure


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    server.answers = [lambda handler: server.released.wait(60) and None]
    scorer = client(server, timeout_s=0.1)
    assert scorer.score(*TWO) == [None, None]
    assert scorer.failure is not None and "reward.timeout_s=0.1, reward.retries=2" in scorer.failure


def test_a_server_that_answers_a_byte_at_a_time_is_given_up(server: Server) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not server.released.wait(0.02):
                handler.wfile.write(b".")
        except OSError:
            pass

    server.answers = [trickle]
    scorer = client(server, timeout_s=0.2)
    assert scorer.score(*TWO) == [None, None]
    assert scorer.failure is not None and "no whole answer within 0.6 s" in scorer.failure


def test_a_server_that_is_not_there_is_said(server: Server) -> None:
    server.server.server_close()
    scorer = client(server)
    assert scorer.score(*TWO) == [None, None]
    assert scorer.failure is not None and "Connection refused" in scorer.failure


def test_the_token_is_sent_and_is_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret-token\n")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.answers = [say("no entry for Bearer s3cret-token", 403)]
    scorer = client(server, token_env="JUDGE_TOKEN")
    assert scorer.score(*TWO) == [None, None]
    assert server.headers[0]["authorization"] == "Bearer s3cret-token"
    assert scorer.failure is not None and "no entry for Bearer ...'" in scorer.failure
    assert "s3cret" not in scorer.failure and "no entry" in caplog.text and "s3cret" not in caplog.text


def test_without_a_token_nothing_of_netrc_is_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.answers = [say('{"scores": [1, 2]}')]
    client(server).score(*TWO)
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("value", "why"), [(None, "not set"), (" ", "not set"), ("a b", "cannot be sent"), ("ü", "be")]
)
def test_a_token_that_is_not_there_or_cannot_be_sent_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str | None, why: str
) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(InputError, match=f"token_env=JUDGE_TOKEN: .*{why}") as refusal:
        client(server, token_env="JUDGE_TOKEN")
    assert not value or value.strip() not in str(refusal.value) or value == " "


def test_columns_that_json_cannot_hold_or_that_hide_others_are_refused(server: Server) -> None:
    for values in ([b"x", b"y"], [1.0, float("nan")]):
        with pytest.raises(InputError, match="which JSON cannot hold|JSON, which cannot hold"):
            client(server, ("odd",)).score(*TWO, {"odd": values})
    assert server.requests == []
    with pytest.raises(InputError, match="prompts.keep: messages is the name of something else"):
        client(server, ("messages",))


def test_the_server_of_the_page_scores() -> None:
    page = (Path(__file__).parents[2] / "docs" / "own_task.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "FastAPI" in block)
    (request,) = (block for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if "responses" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = {**json.loads(request), "responses": ["It is Paris."]}
    assert TestClient(names["app"]).post("/score", json=batch).json() == {"scores": [1.0]}
