"""The benchmark of the control plane, small: it cannot rot, and the driver's whole loop is held without a model."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from rich.console import Console

from benchmarks.control_plane import draw, measure, show, stub_cluster
from benchmarks.stub_workers import StubLearner
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config
from ppo_ray.errors import InputError
from ppo_ray.learner.group import LearnerGroup

pytestmark = pytest.mark.slow


@ray.remote(concurrency_groups=CONTROL)
class Elsewhere(Worker):
    """A learner on a node that does not see the run's folder."""

    def sees(self, file: str, text: str) -> bool:
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folder = tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True)
    with folder as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", short)
        with stub_cluster(6):
            yield


def test_three_workers_and_two_ranks_make_300_trajectories(cluster: None, tmp_path: Path) -> None:
    found = measure(3, 300, tmp_path, per_worker=10, ranks=2)
    assert (found.steps, found.batch_size, len(found.cpu_s)) == (10, 30, 8)
    assert list(found.memory) == [300]
    assert all(value > 0 for value in found.figures.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))  # a worker lost would be a line without a step
    assert {line["stub/num_trajectories"] for line in lines} == {30}
    show([found], Console(file=(tmp_path / "table.txt").open("w")))
    draw([found], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_folder_that_the_learner_does_not_see_is_refused(cluster: None, tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "output_dir": str(tmp_path),
            "model": {"path": "none"},
            "prompts": {"path": "none"},
            "reward": {"path": "none"},
            "learner": {"threads": 1},
        }
    )
    for worker, refused in ((StubLearner, False), (Elsewhere, True)):
        group = LearnerGroup(config, tmp_path / "trajectories", print, worker=worker)
        try:
            if refused:
                with pytest.raises(InputError, match=rf"output_dir={tmp_path}: learner-0 \(pid .*does not see this"):
                    group.setup()
            else:
                group.setup()
        finally:
            group.close()
        assert list(tmp_path.iterdir()) == []
