import pytest

from ppo_ray.config import load_config
from ppo_ray.errors import InputError
from ppo_ray.run.folder import RunFolder, config_text


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
        "checkpoints": "checkpoints",
        "before": "evaluation_before.json",
        "samples": "samples.md",
        "curves": "curves.png",
        "report": "report.html",
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
    (tmp_path / "metrics.jsonl").write_text('{"event": "interrupted", "step": 0}\n')
    (tmp_path / "evaluation_before.json").write_text("of another policy, perhaps")
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path).clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt", "trajectories"]
    (tmp_path / "metrics.jsonl").write_text('{"event": "interrupted", "step": 0}\n{"step": 0}\n')
    with pytest.raises(InputError, match="holds another run"):
        RunFolder.create(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output_dir=.*cannot be created"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(InputError, match=r"output_dir=.*cannot be created"):
        RunFolder.create(tmp_path / "file" / "run")


def test_config_is_written_and_read_back(tmp_path, config):
    folder = RunFolder.create(tmp_path)
    assert not folder.holds_run()
    folder.write_config(config)
    assert folder.config.read_text() == config_text(config)
    assert load_config(folder.config, []) == config
    assert folder.holds_run()


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    folder = RunFolder.create(tmp_path)
    with folder.lock(), pytest.raises(InputError, match="another process is training"), folder.lock():
        pytest.fail("two at once")
    with folder.lock():
        pass
