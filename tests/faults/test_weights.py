"""Engines that do not serve what they were sent: nothing is learnt from what they sample."""

import re
from pathlib import Path

import pytest

from tests.command_line import NO_FORKS, CommandLine, events, lines

pytestmark = pytest.mark.slow

KEEPS_ITS_OWN = """
    from ppo_ray.rollout.hf import HFEngine
    def load_weights(self, snapshot):
        self.policy_version = snapshot.policy_version
    HFEngine.load_weights = load_weights
"""

STALE_HEAD = """
    from torch.nn.functional import linear
    from ppo_ray.rollout.hf import HFEngine
    load = HFEngine.load_weights
    def load_weights(self, snapshot):
        head = self._model.lm_head.weight.clone()
        load(self, snapshot)
        self._model.lm_head.forward = lambda hidden: linear(hidden, head)
    HFEngine.load_weights = load_weights
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


def install(ppo_ray: CommandLine, **bodies: str) -> None:
    """Let workers run Python before anything of their own."""
    parts = [f"if worker == '{name.replace('_', '-')}':\n{body}" for name, body in bodies.items()]
    beginning = [NO_FORKS, "import os", "worker = os.environ.get('PPO_RAY_WORKER')"]
    ppo_ray.put_on_path("sitecustomize.py", "\n".join([*beginning, *parts]))


def test_the_self_check_finds_the_engines_before_the_first_step(ppo_ray: CommandLine, tmp_path: Path) -> None:
    install(ppo_ray, rollout_0=KEEPS_ITS_OWN, rollout_1=STALE_HEAD)
    result = ppo_ray.train("rollout.engine=hf")
    assert result.returncode == 1, result.stderr
    assert "after new weights rollout-0" in result.stderr and "; rollout-1" in result.stderr
    assert "Traceback" not in result.stderr
    assert lines(tmp_path / "run") == []
    assert ppo_ray.wait_until_gone() == []


def test_a_wrong_acknowledgement_ends_the_run_with_every_step_saved(ppo_ray: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    install(ppo_ray, rollout_1=FORGETS_TO_SAY_SO)
    result = ppo_ray.train("rollout.engine=hf", "steps=5")
    assert result.returncode == 1, result.stderr
    assert "rollout-1 serves policy version 1" in result.stderr and "it was sent version 2" in result.stderr
    assert [line["step"] for line in lines(run)] == [0, 1]
    assert (run / "checkpoints" / "latest").readlink().name == "step-00002"
    assert events(run)[-1]["event"] == "interrupted"


def test_check_shows_each_engine(ppo_ray: CommandLine, tmp_path: Path) -> None:
    """Also of weights that are rounded on their way: the learner rounds what it compares with."""
    result = ppo_ray.run("check", str(ppo_ray.config), "rollout.engine=hf", "rollout.wire_dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    assert "rollout-0" in result.stdout and "rollout-1" in result.stdout
    assert "every engine computes with the weights it was sent" in result.stdout
    assert re.search(r"the disk of output_dir takes [\d,]+ MB/s", result.stdout)
    assert not (tmp_path / "run").exists()
    assert ppo_ray.wait_until_gone() == []
