import os
import re
import subprocess
import sys
import time
import types

import pytest
from typer.testing import CliRunner

from ppo_ray import __version__
from ppo_ray.cli import app
from ppo_ray.errors import AssetError, InputError, Interrupted, WorkerError

CONFIG = "output_dir: x\nmodel: {path: m}\nprompts: {path: p.csv}\nreward: {path: r}\n"


@pytest.fixture
def driver(monkeypatch):
    """Stand in for the driver: keep its calls, raise `error` if there is one."""
    import ppo_ray.run

    calls = []
    evaluation = types.SimpleNamespace(to_json=lambda: '{"mean_score": 1.5}')
    fake = types.ModuleType("ppo_ray.run.train")
    fake.error = None

    def record(*arguments):
        calls.append(arguments)
        if fake.error:
            raise fake.error
        return evaluation

    fake.calls, fake.train, fake.check, fake.evaluate = calls, record, record, record
    monkeypatch.setitem(sys.modules, "ppo_ray.run.train", fake)
    monkeypatch.setattr(ppo_ray.run, "train", fake, raising=False)
    return fake


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_train_hands_over_the_config_with_overrides(config, driver):
    result = run("train", config, "steps=7", "ppo.learning_rate=1e-4")
    assert result.exit_code == 0, result.output
    ((parsed,),) = driver.calls
    assert (parsed.steps, parsed.ppo.learning_rate) == (7, 1e-4)


def test_resume_is_an_option_and_a_flag(config, driver):
    assert run("train", config).exit_code == run("train", "--resume", config, "resume=auto").exit_code == 0
    assert run("train", config, "resume=auto").exit_code == 0
    assert [parsed.resume for (parsed,) in driver.calls] == ["never", "required", "auto"]


def test_check_hands_over_the_config(config, driver):
    assert run("check", config, "rollout.workers=2").exit_code == 0
    assert driver.calls[0][0].rollout.workers == 2


@pytest.mark.parametrize("error", [Interrupted(15), SystemExit(15)])  # the second is how Ray answers SIGTERM
def test_a_signal_ends_with_its_code_and_is_no_error(config, driver, error):
    driver.error = error
    result = run("train", config)
    assert (result.exit_code, result.stderr) == (143, "interrupted by SIGTERM\n")


def test_evaluate_hands_over_checkpoint_and_overrides(driver, tmp_path):
    assert run("evaluate", str(tmp_path), "seed=3").exit_code == 0
    assert run("evaluate", str(tmp_path), "--json").stdout == '{"mean_score": 1.5}\n'
    assert [call[:2] for call in driver.calls] == [(tmp_path, ["seed=3"]), (tmp_path, [])]
    assert [call[2].stderr for call in driver.calls] == [False, True]


def test_assets(monkeypatch):
    calls = []
    monkeypatch.setattr("ppo_ray.assets.build.build_assets", lambda demo, force: calls.append((demo, force)))
    assert run("assets", "imdb").exit_code == run("assets", "imdb", "--force").exit_code == 0
    assert calls == [("imdb", False), ("imdb", True)]
    assert run("assets", "mnist").exit_code == 2


def test_the_demo_builds_its_assets_and_goes_on_with_its_run(driver, monkeypatch):
    calls = driver.calls
    monkeypatch.setattr("ppo_ray.assets.build.build_assets", calls.append)
    assert run("demo", "steps=5").exit_code == 0
    assert run("demo", "stpes=5").exit_code == 2  # said before anything is built
    assert run("demo", "--task", "arithmetic").exit_code == 0
    built, (films,), also_built, (sums,) = calls
    assert (built, films.steps, films.resume, films.output_dir) == ("imdb", 5, "auto", "runs/imdb")
    assert (also_built, sums.resume, sums.output_dir) == ("arithmetic", "auto", "runs/arithmetic")


def test_submit_hands_over_what_was_asked_for(config, monkeypatch, tmp_path):
    from ppo_ray.jobs import submit as submission

    calls = []
    monkeypatch.setattr(submission, "submit", lambda request, wait, write, say: calls.append((request, wait)) or 7)
    options = ("--address", "http://h:8265", "--env", "A", "--env", "B", "--name", "films", "--no-wait")
    assert run("submit", config, "steps=7", "--working-dir", str(tmp_path), *options).exit_code == 7
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert run("submit", config).exit_code == 7
    (first, first_wait), (second, second_wait) = calls
    assert (first.config.steps, first.config.resume, first.address) == (7, "auto", "http://h:8265")
    assert (first.name, first.variables, first.working_dir, first_wait) == ("films", ("A", "B"), tmp_path, False)
    assert (second.address, second.working_dir, second.variables) == ("http://other:8265", None, ())
    assert second_wait and second.name.startswith("run-20")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert run("submit", config).exit_code == 2 == run("submit", config, "stpes=7", *options).exit_code
    assert len(calls) == 2


def test_serve_reward_listens_on_loopback_unless_told_otherwise(config, monkeypatch):
    from ppo_ray.reward import serve

    calls = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: calls.append(arguments[:4]))
    assert run("serve-reward", config, "reward.label=GOOD").exit_code == 0
    assert run("serve-reward", config, "--host", "::", "--port", "0", "--token-env", "T").exit_code == 0
    assert run("serve-reward", config, "--port", "65536").exit_code == 2
    assert [call[1:] for call in calls] == [("127.0.0.1", 8000, None), ("::", 0, "T")]
    assert calls[0][0].reward.label == "GOOD"


def test_bad_config_is_a_message_and_exit_code_2(config, driver):
    result = run("train", config, "ppo.clip_rnage=1", "steps=x")
    assert result.exit_code == 2 and not driver.calls
    assert "ppo.clip_rnage: unknown option; did you mean ppo.clip_range?" in result.stderr
    assert "steps: 'x' is not a whole number" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("no [m] model"), 2), (WorkerError("no [m] model"), 1), (AssetError("no [m] model"), 1)],
)
def test_our_errors_become_messages(error, code, config, driver):
    driver.error = error
    result = run("train", config)
    assert (result.exit_code, result.stderr, result.stdout) == (code, "error: no [m] model\n", "")


def test_ctrl_c_exits_130(config, driver):
    driver.error = KeyboardInterrupt()
    assert run("train", config).exit_code == 130


def test_a_bug_keeps_its_traceback(config, driver):
    driver.error = ZeroDivisionError()
    result = run("train", config)
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("arguments", [[], ["train"], ["trian"], ["train", "--frob", "x"], ["train", "no.yaml"]])
def test_usage_errors_exit_2(arguments):
    assert run(*arguments).exit_code == 2


def test_help_of_train_names_the_options_and_the_exit_codes():
    text = " ".join(run("train", "--help").stdout.split())
    assert "ppo-ray options" in text and "Exit codes: 0 the run is done, 1 it failed, 2 " in text


def test_version():
    assert run("--version").stdout == f"ppo-ray {__version__}\n"


def test_help_is_fast_and_imports_nothing_heavy():
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "120"}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "ppo_ray", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 5  # 0.2 s on an idle core; the rest is for a busy one
    loaded = set(re.findall(r"\|\s+(\w+)", result.stderr))
    assert "typer" in loaded
    assert not loaded & {
        "torch",
        "ray",
        "transformers",
        "vllm",
        "pyarrow",
        "datasets",
        "pydantic",
        "omegaconf",
        "numpy",
    }
    assert all(command in result.stdout for command in ("train", "assets", "evaluate"))


def test_an_error_cannot_move_the_terminals_cursor(tmp_path):
    data = tmp_path / "p.csv"
    data.write_text("\x1b]0;owned\x07,b\nx,y\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{path: {tmp_path}}}\nprompts: {{path: {data}}}\nreward: {{path: x}}"
    )
    result = run("train", str(config))
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr and "\\x1b]0;owned\\x07" in result.stderr
