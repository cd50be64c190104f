"""The options of trackers: what is refused before anything starts."""

import importlib.util
from pathlib import Path

import pytest

from ppo_ray.config import Config, load_config, tracking_problems
from ppo_ray.errors import InputError

REQUIRED = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r"]


def load(*options: str) -> Config:
    return load_config(None, [*REQUIRED, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trackers=[wandbb]"], "'wandbb' is no tracker; there are wandb, mlflow, trackio, swanlab, and a class as"),
        (["trackers=[wandb,wandb]"], "wandb, wandb: one is named twice"),
        (["options={wandb: {mode: offline}}"], "wandb is none of the trackers"),
        (
            ["trackers=[wandb]", "options={wandb: {api_key: abc}}"],
            "wandb.api_key: would write a secret .*WANDB_API_KEY",
        ),
        (
            ["trackers=[mlflow]", "options={mlflow: {tracking_uri: 'http://me:abc@host'}}"],
            "MLFLOW_TRACKING_URI or MLFLOW",
        ),
        (["trackers=[trackio]", "options={trackio: {server_url: 'http://h/?write_token=abc'}}"], "TRACKIO_WRITE_TOKEN"),
        (["trackers=[wandb]", "options={wandb: {settings: {x: {password: abc}}}}"], "wandb.settings.x.password: would"),
    ],
)
def test_wrong_options_are_refused_and_no_secret_is_shown(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(*(f"tracking.{option}" for option in options))
    assert "abc" not in str(caught.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Return the names of libraries that seem to be installed; there is no key and no login."""
    names: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "NETRC",
        "SWANLAB_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return names


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "swanlab"])
def test_a_missing_library_is_named_with_what_installs_it(installed: set[str], name: str) -> None:
    (problem,) = tracking_problems(load(f"tracking.trackers=[{name}]").tracking)
    assert problem == (
        f"tracking.trackers={name}: {name} is not installed; pip install {name}, or pip install 'ppo-ray[{name}]'"
    )


def test_without_a_key_only_an_offline_run_is_right(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed |= {"wandb", "mlflow", "trackio", "swanlab"}
    config = load("tracking.trackers=[wandb,mlflow,trackio,swanlab]").tracking
    assert [problem.partition(" in the")[0] for problem in tracking_problems(config)] == [
        "tracking.trackers=wandb: no WANDB_API_KEY",
        "tracking.trackers=swanlab: no SWANLAB_API_KEY",
    ]
    offline = "tracking.options={wandb: {mode: offline}, swanlab: {mode: offline}}"
    assert not list(tracking_problems(load("tracking.trackers=[wandb,swanlab]", offline).tracking))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password abc")
    monkeypatch.setenv("SWANLAB_API_KEY", "abc")
    assert not list(tracking_problems(config))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert len(list(tracking_problems(config))) == 1


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "importing it raised ModuleNotFoundError: No module named 'mine_"),
        ("class Other: pass", "importing it raised AttributeError: module 'mine_"),
        ("raise SystemExit(3)", "importing it raised SystemExit: 3"),
        ("Tracker = 3", "is a int, not a class"),
        ("class Tracker: pass", None),
    ],
)
def test_a_class_of_ones_own_must_be_there(
    module: str | None,
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    name = f"mine_{abs(hash(request.node.name))}"
    if module is not None:
        (tmp_path / f"{name}.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    problems = list(tracking_problems(load(f"tracking.trackers=[{name}:Tracker]").tracking))
    assert (not problems and message is None) or (message is not None and message in problems[0])
