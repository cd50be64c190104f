"""The server of `ppo-ray view`: who may ask, what it answers, and that nothing leads out of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ppo_ray.errors import InputError
from ppo_ray.run.record import RunRecord
from ppo_ray.view import server
from ppo_ray.view.server import HEADERS, is_expected_host, make_app
from ppo_ray.view.shown import View
from tests.view.runs import ROWS, append_step, make_run, write_step

TOKEN = "the-token"


def open_client(*runs: Path, token: str = TOKEN, host: str = "127.0.0.1") -> TestClient:
    headers = {"Authorization": f"Bearer {token}"}
    return TestClient(
        make_app([View(run) for run in runs], TOKEN, host), base_url="http://127.0.0.1:8000", headers=headers
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def client(run: Path) -> TestClient:
    return open_client(run)


def ask(client: TestClient, path: str, **query: Any) -> Any:
    answer = client.get(f"/api/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


PATHS = [
    "runs",
    "runs/0",
    "runs/0/samples",
    "runs/0/samples/0/0",
    "runs/0/spread/kl",
    "runs/0/spread/kl/0",
    "runs/0/workers/0",
    "runs/0/memory",
]


@pytest.mark.parametrize("path", PATHS)
def test_data_needs_the_token(run: Path, path: str) -> None:
    assert open_client(run).get(f"/api/{path}").status_code == 200
    for token in ("", "wrong", TOKEN + "x"):
        answer = open_client(run, token=token).get(f"/api/{path}")
        assert answer.status_code == 401 and "open the address" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(client: TestClient, method: str) -> None:
    assert client.request(method, "/api/runs").status_code == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "[fe80::1]:80"]
)
def test_another_name_for_this_machine_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/api/runs", "/static/app.js"):
        assert client.get(path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "localhost:8080", "[::1]:80", "LOCALHOST"])
def test_this_machine_and_tunnels_to_it_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"Host": host}).status_code == 200


def test_a_network_may_use_addresses_but_no_foreign_names() -> None:
    assert is_expected_host("10.1.2.3:80", "0.0.0.0") and is_expected_host("node7:80", "node7")
    assert not is_expected_host("evil.example", "0.0.0.0")


@pytest.mark.parametrize(
    "path", ["/", "/static/app.js", "/static/style.css", "/static/uPlot.esm.js", "/api/runs", "/nothing", "/api/runs/7"]
)
def test_every_answer_has_the_headers_that_keep_texts_texts(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (
        HEADERS.items() <= dict(answer.headers).items()
        or {k.lower(): v for k, v in HEADERS.items()}.items() <= dict(answer.headers).items()
    )
    assert "access-control-allow-origin" not in answer.headers
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e%2f%2e%2e%2fcli.py",
        "/static/vendor",
        "/static/vendor/uPlot.esm.js",
        "/static/uPlot.LICENSE",
        "/static//etc/passwd",
    ],
)
def test_only_files_of_the_page_are_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "1",
        "-1",
        "0/samples/99/0",
        "0/samples/0/99",
        "0/samples/0/-1",
        "0/samples/..%2f/0",
        "0/spread/seed",
        "0/spread/kl/99",
    ],
)
def test_what_is_not_there_is_refused_with_words(client: TestClient, path: str) -> None:
    answer = client.get(f"/api/runs/{path}")
    assert answer.status_code in (400, 404, 422) and (answer.json()["detail"])


def test_the_record_of_a_run(client: TestClient) -> None:
    known = ask(client, "runs")["runs"][0]
    assert (known["name"], known["num_steps"], known["num_planned"], known["last_event"]) == (
        "run",
        3,
        5,
        "worker_replaced",
    )
    record = ask(client, "runs/0")
    assert record["metrics"]["score/mean"] == [0, 0.5, 1]
    assert record["metrics"]["policy/entropy"] == [None] * 3
    assert [(event["event"], event["step"]) for event in record["events"]] == [("worker_replaced", 2)]
    assert [(item["name"], item["steps"]) for item in record["unhealthy"]] == [("policy/clip_fraction", [0])]
    assert record["held_out"] == [{"step": 0, "eval/score_mean": 0.25}]
    changes = {item["name"]: item["value"] for item in record["changes"]}
    assert changes == {
        "steps": 5,
        "output_dir": record["folder"],
        "model.path": "no/where",
        "prompts.path": "p",
        "reward.path": "r",
    }


def test_samples_are_filtered_and_sorted(client: TestClient) -> None:
    found = ask(
        client,
        "runs/0/samples",
        **{"min.score": 3, "max.step": 1, "worker": "rollout-1", "sort": "kl", "order": "desc"},
    )
    assert [(row["step"], row["row"]) for row in found["rows"]] == [(1, 5), (1, 3), (0, 3), (0, 5)]
    assert (found["num_matches"], found["num_rows"], found["is_whole"]) == (4, 3 * ROWS, True)
    assert found["choices"] == {"finish_reason": ["length", "stop"], "worker": ["rollout-0", "rollout-1"]}
    assert found["numbers"]["score"] == {"min": 0, "max": 6}
    answer = client.get("/api/runs/0/samples", params={"min.score": "much"})
    assert (answer.status_code, answer.json()["detail"][:12]) == (400, "not a number")


def test_a_sample_has_every_figure_of_every_token(client: TestClient) -> None:
    found = ask(client, "runs/0/samples/2/3")
    assert (found["prompt"], found["response"], found["num_tokens"]) == ("prompt 3", "response 2 3", 4)
    assert found["facts"]["seed"] == str(2**60 + 3)  # a browser's numbers are not that exact
    assert found["facts"]["parts"] == {"style": 1.5, "length": 3.0}
    assert found["tokens"]["figures"]["kl"] == [2.0] * 4 and found["tokens"]["ids"] == [0, 1, 2, 3]
    assert found["tokens"]["texts"] is None  # there is no tokenizer of no/where
    assert (found["num_alike"], [row["step"] for row in found["alike"]]) == (3, [0, 1, 2])
    part = ask(client, "runs/0/samples/2/3", offset=2, limit=1)["tokens"]
    assert (part["ids"], part["figures"]["advantages"], part["offset"]) == ([2], [0.25], 2)
    unscored = ask(client, f"runs/0/samples/2/{ROWS - 1}")["tokens"]["figures"]
    assert unscored["kl"] is None and unscored["rollout_logprobs"] == [-0.5] * ROWS


def test_distributions(client: TestClient) -> None:
    found = ask(client, "runs/0/spread/score")
    assert [step["step"] for step in found["steps"]] == [0, 1, 2]
    assert found["steps"][0]["quantiles"][3] == 3.0
    histogram = ask(client, "runs/0/spread/tokens/1", bins=8)
    assert (sum(histogram["counts"]), histogram["num_values"]) == (ROWS, ROWS)
    assert ask(client, "runs/0/spread/log_ratio")["steps"][1]["quantiles"] == [0.0] * 7
    workers = ask(client, "runs/0/workers/1")["workers"]
    assert [(worker["name"], worker["responses"], worker["tokens"]) for worker in workers] == [
        ("rollout-0", 4, 16),
        ("rollout-1", 4, 20),
    ]


def test_where_actors_ran_and_what_memory_they_took(client: TestClient) -> None:
    learner, *rollout = ask(client, "runs/0/workers/1")["actors"]
    assert [(actor["name"], actor["host"]) for actor in rollout] == [("rollout-0", "node-0"), ("rollout-1", "node-1")]
    assert [actor["time/generate_s"] for actor in rollout] == [1.0, 0.5]
    assert (learner["name"], "host" in learner, learner["memory/learner_gpu_reserved_gib"]) == ("learner-0", False, 6.5)
    memory = ask(client, "runs/0/memory")
    assert memory["steps"] == [0, 1, 2] and list(memory["actors"]) == ["learner-0", "rollout-0", "rollout-1"]
    assert memory["actors"]["rollout-0"] == {"memory/rollout_gib": [2.0, 3.0, 4.0]}
    assert ask(client, "runs/0/workers/9")["actors"] == []


def test_a_run_that_does_not_tell_of_its_actors(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    (run / "actors.jsonl").unlink()
    client = open_client(run)
    assert ask(client, "runs/0/memory") == {"steps": [], "actors": {}}
    assert ask(client, "runs/0/workers/0")["actors"] == []


def test_a_run_under_way_is_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    client = open_client(run)
    assert ask(client, "runs/0/samples")["num_rows"] == 2 * ROWS
    append_step(run, 2)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "score/m')  # being written
    assert ask(client, "runs")["runs"][0]["num_steps"] == 3
    assert ask(client, "runs/0")["notes"] == []
    assert ask(client, "runs/0/samples")["num_rows"] == 3 * ROWS


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    (run / "trajectories" / "step-00001.parquet").write_bytes(b"PAR1 torn")
    (run / "evaluation_before.json").write_text("{}")
    (run / "config.yaml").write_text("[1, 2")
    with (run / "metrics.jsonl").open("a") as log:
        log.write("nothing of ours\n")
    client = open_client(run)
    found = ask(client, "runs/0/samples")
    assert (found["num_rows"], list(found["skipped"])) == (ROWS, ["step-00001.parquet"])
    notes = " ".join(ask(client, "runs/0")["notes"])
    for name in ("metrics.jsonl: 1 lines", "config", "evaluation_before.json", "step-00001.parquet"):
        assert name in notes
    assert ask(client, "runs/0/spread/kl")["notes"][0].startswith("step 1")
    assert ask(client, "runs/0/workers/1")["notes"]
    assert client.get("/api/runs/0/samples/1/0").status_code == 404


@pytest.mark.parametrize("text", ["\x00\x1b[2J", "\u202eabc", "\ud83d\ude00", "</script>", "a" * 1_000_000])
def test_any_text_comes_through(tmp_path: Path, text: str) -> None:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    run = make_run(tmp_path / "run", 1, {0: [text] * ROWS})
    client = open_client(run)
    assert ask(client, "runs/0/samples/0/0")["response"] == text
    row = ask(client, "runs/0/samples")["rows"][0]
    assert (row["response"], row["response_chars"]) == (text[:400], len(text))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        View(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        View(tmp_path / "none")


def test_it_writes_nothing_into_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)

    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}

    before = state()
    client = open_client(run)
    for path in PATHS:
        ask(client, path)
    assert state() == before


def test_a_link_leads_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    write_step(run, 5).replace(tmp_path / "secret.parquet")
    (run / "trajectories" / "step-00005.parquet").symlink_to(tmp_path / "secret.parquet")
    answer = open_client(run).get("/api/runs/0/samples/5/0")
    assert answer.status_code == 404 and "leads out of the run's folder" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "evaluation_before.json", "actors.jsonl"])
def test_no_file_of_a_run_leads_out_of_it(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", 1)
    (run / name).replace(tmp_path / name)
    (run / name).symlink_to(tmp_path / name)
    if name == "actors.jsonl":
        assert ask(open_client(run), "runs/0/memory")["steps"] == [] and RunRecord.read(run).find_actors() == []
    else:
        with pytest.raises(InputError, match=f"{name}: is a link that leads out of the run's folder"):
            View(run)


def test_the_pages_scripts_are_short_and_never_read_text_as_html() -> None:
    static = Path(server.__file__).parent / "static"
    scripts = {path.name: path.read_text() for path in static.glob("*.js")}
    assert {name for name, text in scripts.items() if len(text.splitlines()) > 300} == set()
    reads = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc")
    assert [name for name, text in scripts.items() if reads.search(text)] == []
    assert not reads.search((static / "vendor" / "uPlot.esm.js").read_text())
