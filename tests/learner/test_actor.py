"""The learner's actor as a plain object, without Ray: what it holds for the next step."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ppo_ray.atomic import name_aside
from ppo_ray.checkpoint import AHEAD, RunState, verify
from ppo_ray.config import Config, load_config
from ppo_ray.errors import CheckpointError, WorkerError, WorkerLost
from ppo_ray.learner.actor import LearnerWorker
from ppo_ray.rollout.actor import RolloutWorker
from ppo_ray.weights.acks import WeightAck, check_agreements
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import Buffers, WeightSnapshot
from tests.learner.test_lora import generate
from tests.learning import make_table


@pytest.fixture(autouse=True)
def threads_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # an actor has its process for itself


def configured(policy: Path, folder: Path, *more: str) -> Config:
    options = [f"output_dir={folder}", f"model.path={policy}", "prompts.path=p", "reward.path=r"]
    options += ["rollout.batch_size=10", "rollout.max_staleness=1", "ppo.importance_cap=2", "learner.threads=1", *more]
    return load_config(None, options)


def started(policy: Path, folder: Path, checkpoint: Path | None = None, *more: str):
    worker = LearnerWorker.__ray_metadata__.modified_class("learner-0")
    worker.setup(configured(policy, folder, *more), checkpoint and str(checkpoint))
    return worker


def shards(step: int, version: int) -> list[pa.Table]:
    table = make_table(8)
    for name, value in (("step", step), ("policy_version", version)):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(name), pa.array([value] * 8, pa.int64()))
    return [table.slice(0, 3), table.slice(3)]


def save(worker, path: Path) -> None:
    worker.save(str(path), str(name_aside(path)), RunState(1), "")


def publish(worker, moved: bool = False) -> tuple[WeightAck, WeightManifest, list[np.ndarray]]:
    """Return the acknowledgement, the manifest and copies of the buckets, which are all in the same memory."""
    *buckets, manifest, ack = (item.copy() if isinstance(item, np.ndarray) else item for item in worker.publish(moved))
    return ack, manifest, buckets


def test_on_a_cpu_the_state_is_written_as_it_lies_and_the_next_update_waits(tiny_policy: Path, tmp_path: Path) -> None:
    worker = started(tiny_policy, tmp_path)
    worker.hold(*shards(0, 0))
    worker.update(0, str(tmp_path / "a.parquet"))
    worker.hold(*shards(1, 1))
    before = publish(worker)[0].checksum
    save(worker, tmp_path / "c")
    with ThreadPoolExecutor() as pool:
        update = pool.submit(worker.update, 1, str(tmp_path / "b.parquet"))
        with pytest.raises(TimeoutError):
            update.result(0.5)
        worker.write()
        update.result(60)
    assert publish(worker)[0].checksum != before
    assert publish(started(tiny_policy, tmp_path, tmp_path / "c"))[0].checksum == before


def test_what_is_held_is_saved_restored_and_learnt_from(tiny_policy: Path, tmp_path: Path) -> None:
    worker = started(tiny_policy, tmp_path)
    worker.hold(*shards(0, 0))
    report = worker.update(0, str(tmp_path / "step-0.parquet"))
    assert report.trajectories is None and report.minibatches == ()  # the driver reads a few floats
    assert report.metrics["rollout/staleness_max"] == 0
    assert report.metrics["prompts/num_skipped"] == 2
    with pytest.raises(CheckpointError, match="does not hold the next step's trajectories yet: not saved"):
        save(worker, tmp_path / "c")
    worker.write()  # nothing, and at once
    worker.hold(*shards(1, 0))
    worker._buffers = Buffers()  # as on a GPU
    save(worker, tmp_path / "c")
    reports = [worker.update(1, str(tmp_path / "a.parquet"))]
    assert not (tmp_path / "c").exists()
    worker.write()  # what was copied, though all weights and moments have changed since
    assert (tmp_path / "c" / AHEAD).is_file()
    verify(tmp_path / "c")

    again = started(tiny_policy, tmp_path, tmp_path / "c")
    reports.append(again.update(1, str(tmp_path / "b.parquet")))
    assert publish(worker)[0].checksum == publish(again)[0].checksum
    assert reports[0].metrics["rollout/staleness_mean"] == 1
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_attention_has_the_same_kernels_whatever_sends_the_weights(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM, which NCCL alone loads into the learner, turns cuDNN's attention off."""
    chosen: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    started(tiny_policy, tmp_path)
    assert chosen == [False]


def test_what_is_too_stale_is_not_learnt_from(tiny_policy: Path, tmp_path: Path) -> None:
    worker = started(tiny_policy, tmp_path)
    for step in (0, 1):
        worker.update(step, str(tmp_path / "x.parquet"), *shards(step, 0))
    with pytest.raises(WorkerError, match=r"rollout-0 .* policy version 0, but the learner is at version 2"):
        worker.update(2, str(tmp_path / "x.parquet"), *shards(2, 0))


@pytest.mark.parametrize("transport", ["nccl", "object_store"])
def test_moved_weights_stay_until_they_are_sent(tiny_policy: Path, tmp_path: Path, transport: str) -> None:
    """What is sent from the GPU is read when the engines are ready: no copy of the model is made for a check."""
    worker = started(tiny_policy, tmp_path, None, f"rollout.weight_transport={transport}")

    def own() -> str:
        return WeightManifest.of(worker._learner.named_weights(), 0, "sums").checksum

    before = own()
    _, manifest, _ = publish(worker, moved=True)
    if transport == "nccl":
        assert own() == manifest.checksum != before
        worker.compare(*shards(0, 0))
        assert own() == before
        publish(worker, moved=True)
        assert publish(worker)[0].checksum == before
        publish(worker, moved=True)
        worker.update(0, str(tmp_path / "moved.parquet"), *shards(0, 0))
        undisturbed = started(tiny_policy, tmp_path)
        undisturbed.update(0, str(tmp_path / "step.parquet"), *shards(0, 0))
        worker, moved = undisturbed, own()
        assert own() == moved != before
    assert own() != manifest.checksum


def test_weights_from_before_an_update_are_gone_with_it(tiny_policy: Path, tmp_path: Path) -> None:
    """An engine that is lost during the update asks for them afterwards: what it got would not be what it asked for."""
    worker = started(tiny_policy, tmp_path, None, "rollout.weight_transport=nccl")
    publish(worker)
    worker.send_weights(0)
    worker.update(0, str(tmp_path / "step.parquet"), *shards(0, 0))
    with pytest.raises(WorkerLost, match="policy version 0 are asked for, but the learner has those of version 1"):
        worker.send_weights(0)
    publish(worker)
    worker.send_weights(1)


def test_adapters_alone_go_from_a_learner_to_an_engine(tiny_policy: Path, tmp_path: Path) -> None:
    """Both actors as plain objects; first with new adapters, then with those of a checkpoint, on the frozen weights."""
    options = ("model.lora.rank=4", "rollout.adapter_sync=adapter", "rollout.engine=hf", "prompts.max_tokens=8")
    worker = started(tiny_policy, tmp_path, None, *options)
    worker.hold(*shards(0, 0))
    worker.update(0, str(tmp_path / "step-0.parquet"))
    worker.hold(*shards(1, 0))
    save(worker, tmp_path / "c")
    worker.write()
    for lora in (options[0], f"model.lora.path={tmp_path / 'c'}"):
        worker = started(tiny_policy, tmp_path, None, lora, *options[1:])
        rollout = RolloutWorker.__ray_metadata__.modified_class("rollout-0")
        rollout.setup(configured(tiny_policy, tmp_path, lora, *options[1:]))
        ack, manifest, buckets = publish(worker, moved=True)
        assert len(manifest.entries) == 2 * 7 * 2 and len(buckets) == worker.num_buckets() == 1
        rollout._engine.load_weights(WeightSnapshot(manifest, buckets))
        found = worker.compare(generate(rollout._engine))
        check_agreements(found, "float32")
        assert ack.checksum == manifest.checksum
