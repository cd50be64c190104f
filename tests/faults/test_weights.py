"""Engines that do not serve what they were sent: nothing is learnt from what they sample."""

from pathlib import Path

import pytest

from tests.command_line import CommandLine, events, lines

pytestmark = pytest.mark.slow

KEEPS_ITS_OWN = """
    from ppo_ray.rollout.hf import HFEngine
    def load_weights(self, snapshot):
        self.policy_version = snapshot.policy_version
    HFEngine.load_weights = load_weights
"""

STALE_HEAD = """
    from ppo_ray.rollout.vllm import VLLMEngine
    VLLMEngine._tied_head = property(lambda self: False, lambda self, value: None)
"""

FORGETS_TO_SAY_SO = """
    from ppo_ray.rollout.hf import HFEngine
    load = HFEngine.load_weights
    def load_weights(self, snapshot):
        load(self, snapshot)
        if snapshot.policy_version == 2:
            self.policy_version = 1
    HFEngine.load_weights = load_weights
"""


@pytest.fixture
def wrong_worker(ppo_ray: CommandLine, tmp_path: Path):
    """Return a function that runs Python in rollout-1 before anything of its own."""

    def install(body: str) -> CommandLine:
        (tmp_path / "sitecustomize.py").write_text(
            f"import os\nif os.environ.get('PPO_RAY_WORKER') == 'rollout-1':\n{body}"
        )
        ppo_ray.environment["PYTHONPATH"] = str(tmp_path)
        return ppo_ray

    return install


@pytest.mark.parametrize(("engine", "body"), [("hf", KEEPS_ITS_OWN), ("vllm", STALE_HEAD)])
def test_the_self_check_finds_the_engine_before_the_first_step(
    wrong_worker, tmp_path: Path, engine: str, body: str
) -> None:
    ppo_ray = wrong_worker(body)
    result = ppo_ray.train(f"rollout.engine={engine}")
    assert result.returncode == 1, result.stderr
    assert "after new weights rollout-1" in result.stderr
    assert "rollout-0" not in result.stderr
    assert "Traceback" not in result.stderr
    assert lines(tmp_path / "run") == []
    assert ppo_ray.wait_until_gone() == []


def test_a_wrong_acknowledgement_ends_the_run_with_every_step_saved(wrong_worker, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ppo_ray = wrong_worker(FORGETS_TO_SAY_SO)
    result = ppo_ray.train("rollout.engine=hf", "steps=5")
    assert result.returncode == 1, result.stderr
    assert "rollout-1 serves policy version 1" in result.stderr and "it was sent version 2" in result.stderr
    assert [line["step"] for line in lines(run)] == [0, 1]
    assert (run / "checkpoints" / "latest").readlink().name == "step-00002"
    assert events(run)[-1]["event"] == "interrupted"


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_check_shows_each_engine(ppo_ray: CommandLine, tmp_path: Path, engine: str) -> None:
    """Also of weights that are rounded on their way: the learner rounds what it compares with."""
    result = ppo_ray.run("check", str(ppo_ray.config), f"rollout.engine={engine}", "rollout.wire_dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    assert "rollout-0" in result.stdout and "rollout-1" in result.stdout
    assert "every engine computes with the weights it was sent" in result.stdout
    assert not (tmp_path / "run").exists()
    assert ppo_ray.wait_until_gone() == []
