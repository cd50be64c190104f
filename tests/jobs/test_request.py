"""What is wrong with a submission and can be said before a cluster is asked; neither Ray nor a network is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.jobs.request import (
    JobRequest,
    _paths,
    describe_exposure,
    describe_unsent_tokens,
    head_problems,
    make_job_name,
    request_problems,
)

TOKEN = {"RAY_AUTH_TOKEN": "s" * 40}
BASE = ("output_dir=/shared/run", "model.path=org/model", "prompts.path=imdb", "reward.path=/models/judge")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder of nothing."""
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    return here


def request(*overrides: str, working_dir: Path | None = None, **fields) -> JobRequest:
    config = load_config(None, [*BASE, *overrides])
    return JobRequest(config, **{"address": "http://h:8265", "name": "films", "working_dir": working_dir, **fields})


def problems(wanted: JobRequest, environment: dict[str, str] = TOKEN, sent: tuple[str, ...] = ()) -> list[str]:
    return [*head_problems(wanted, environment), *request_problems(wanted, environment, sent.__contains__)]


def test_what_is_right_passes() -> None:
    assert problems(request()) == []
    assert problems(request("ray.address=auto", variables=("HF_TOKEN",)), {**TOKEN, "HF_TOKEN": ""}) == []


def test_everything_is_said_at_once() -> None:
    wanted = request("output_dir=runs/x", "ray.address=10.0.0.1:6379", "model.path=./policy", address="h:8265")
    found = problems(JobRequest(wanted.config, "h:8265", "a/b", None, ("NO_SUCH",)), {"HOME": "/nowhere"})
    assert [line.partition(":")[0].partition("=")[0] for line in found] == [
        "--address",
        "no token for the cluster",
        "--name",
        "--env NO_SUCH",
        "output_dir",
        "ray.address",
        "model.path",
    ]
    assert "must be absolute, on storage that all nodes share" in found[4]


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://h:10001", "auto", ""])
def test_the_address_is_the_dashboards(address: str) -> None:
    (line,) = problems(request(address=address))
    assert "e.g. http://HOST:8265" in line


def test_a_token_is_looked_for_where_ray_does(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    (line,) = problems(request(), home)
    assert f"RAY_AUTH_TOKEN is not set, and {tmp_path}/.ray/auth_token is not there or empty" in line
    (line,) = problems(request(), home | {"RAY_AUTH_TOKEN_PATH": f"{tmp_path}/other"})
    assert f"{tmp_path}/other is not there or empty" in line
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    assert len(problems(request(), home)) == 1
    (tmp_path / ".ray" / "auth_token").write_text("s" * 40)
    assert problems(request(), home) == []
    assert len(problems(request(), home | {"RAY_AUTH_TOKEN_PATH": f"{tmp_path}/other"})) == 1  # it would be taken
    assert problems(request(), {"RAY_AUTH_MODE": "disabled"}) == []


def test_variables_go_by_name_and_no_value_is_shown() -> None:
    environment = {**TOKEN, "HF_TOKEN": "hf_secret", "RAY_ADDRESS": "x"}
    found = problems(request(variables=("HF_TOKEN=hf_secret", "WANDB_KEY", "RAY_ADDRESS", "HF_TOKEN")), environment)
    assert found == [
        "--env HF_TOKEN: give the name alone; its value is taken from here, and need not be typed",
        "--env WANDB_KEY: is not set here; export it, or leave it out",
        "--env RAY_ADDRESS: is the cluster's own to set; leave it out",
    ]


def test_a_servers_token_that_does_not_go_with_the_job_is_said() -> None:
    parts = [{"name": "a", "path": "c"}, {"name": "b", "url": "https://h/", "token_env": "JUDGE_TOKEN"}]
    options = "reward.path=null", f"reward.parts={parts}"
    (line,) = describe_unsent_tokens(request(*options, variables=("HF_TOKEN",)))
    assert line.startswith("warning: reward.parts[1].token_env=JUDGE_TOKEN is not among --env")
    assert line.endswith("--env JUDGE_TOKEN")
    assert not list(describe_unsent_tokens(request(*options, variables=("JUDGE_TOKEN",))))
    assert not list(describe_unsent_tokens(request()))


@pytest.mark.parametrize("path", ["./films.csv", "films.csv", "a/b/c", "../films", "here-it-is"])
def test_a_relative_path_needs_a_folder_that_is_sent(path: str, empty_folder: Path) -> None:
    (empty_folder / "here-it-is").mkdir()
    (line,) = problems(request(f"prompts.path={path}"))
    assert line.startswith(f"prompts.path={path}: is relative, and no folder is sent") and "--working-dir" in line


def test_a_relative_path_must_lie_in_the_folder_and_be_sent(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "data" / "films.csv").touch()
    wanted = request("prompts.path=data/films.csv", "model.path=org/model", working_dir=work)
    assert problems(wanted, sent=("data/films.csv",)) == []
    (line,) = problems(wanted, sent=("data/other.csv",))
    assert line.startswith(f"prompts.path=data/films.csv: is not among the files that are sent of --working-dir={work}")
    assert ".gitignore, .rayignore" in line
    (line,) = problems(request("prompts.path=films.csv", working_dir=work), sent=("films.csv",))
    assert line.startswith(f"prompts.path=films.csv: is not in --working-dir={work}")


def test_a_reward_function_must_be_sent_or_installed(tmp_path: Path, empty_folder: Path) -> None:
    (work := tmp_path / "work").mkdir()
    (work / "judge.py").touch()
    (empty_folder / "critic").mkdir()
    function = "reward.path=null", "reward.function=judge:score"
    assert problems(request(*function, working_dir=work), sent=("judge.py",)) == []
    (line,) = problems(request(*function, working_dir=work))
    assert line.startswith(f"reward.function=judge:score: judge is not sent with --working-dir={work}")
    assert problems(request(*function)) == []  # the cluster may have it
    here = "reward.path=null", "reward.function=critic.film:score"
    (line,) = problems(request(*here))
    assert line.endswith("critic lies here and is not sent; send its folder: --working-dir .")
    (empty_folder / "numpy").mkdir()
    assert problems(request("reward.path=null", "reward.function=numpy:score")) == []  # installed


def test_every_path_of_a_config_is_looked_at() -> None:
    options = [
        f"{section}.{option}"
        for section, field in Config.model_fields.items()
        for option in getattr(field.annotation, "model_fields", {})
        if option.endswith("path")
    ]
    config = load_config(
        None,
        [*BASE, "model.critic=separate", *(f"{option}=org/model" for option in options if option != "reward.path")],
    )
    assert sorted(_paths(config)) == sorted(options)


def test_names() -> None:
    assert make_job_name(Path("/x/my films.yaml")).startswith("my-films-20")
    assert make_job_name(Path("...")).startswith("job-20")
    assert len({make_job_name(Path("a.yaml")) for _ in range(9)}) > 1  # in one second
    assert problems(request(name=make_job_name(Path("a" * 300)))) == []
    assert len(problems(request(name="a/b"))) == len(problems(request(name="-a"))) == 1


def test_neither_ray_nor_torch_is_imported() -> None:
    probe = "import sys, ppo_ray.jobs.submit; print([name for name in ('ray', 'torch', 'vllm') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:1", "https://h:8265"]
)
def test_a_token_that_nobody_can_read_needs_no_warning(address: str) -> None:
    assert describe_exposure(address) is None


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "http://127.example.org:8265", "http://head:8265"])
def test_a_token_that_crosses_a_network_in_clear_is_said(address: str) -> None:
    assert "can be read on the way" in (describe_exposure(address) or "")
