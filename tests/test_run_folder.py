import os

import pytest

from ppo_ray.config import load_config
from ppo_ray.errors import InputError
from ppo_ray.run_folder import RunFolder, write_atomically


@pytest.fixture
def config():
    return load_config(None, ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r", "steps=7"])


def test_layout(tmp_path):
    folder = RunFolder.create(tmp_path / "deep" / "run")
    names = {
        "config": "config.yaml",
        "metrics": "metrics.jsonl",
        "tensorboard": "tensorboard",
        "trajectories": "trajectories",
        "final_checkpoint": "checkpoints/final",
        "samples": "samples.md",
        "curves": "curves.png",
    }
    assert {name: getattr(folder, name).relative_to(folder.path).as_posix() for name in names} == names
    assert folder.trajectory_file(3).relative_to(folder.path).as_posix() == "trajectories/step-00003.parquet"
    assert folder.trajectories.is_dir() and folder.path.is_absolute()


@pytest.mark.parametrize(
    "left", ["metrics.jsonl", "trajectories/step-00000.parquet", "checkpoints/final/x", "samples.md"]
)
def test_another_run_is_refused_and_untouched(left, tmp_path):
    file = tmp_path / left
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    with pytest.raises(InputError, match=r"holds another run .*output_dir=") as caught:
        RunFolder.create(tmp_path)
    assert caught.value.exit_code == 2
    assert file.read_text() == "precious"


def test_a_run_that_took_no_step_may_be_started_again(tmp_path, config):
    RunFolder.create(tmp_path).write_config(config)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output_dir=.*cannot be created"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(InputError, match=r"output_dir=.*cannot be created"):
        RunFolder.create(tmp_path / "file" / "run")


def test_config_is_written_and_read_back(tmp_path, config):
    folder = RunFolder.create(tmp_path)
    folder.write_config(config)
    folder.write_config(config, folder.final_checkpoint)
    assert load_config(folder.config, []) == load_config(folder.final_checkpoint / "config.yaml", []) == config


def test_a_failed_write_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
