"""The trainer over real Ray actors: the same statistics, and a model that follows."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ppo_ray.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

pytestmark = pytest.mark.slow
OPTIONS = ["rollout.engine=hf", "rollout.workers=2", "rollout.max_context=64", "learner.threads=1"]
OPTIONS += ["rollout.weight_bucket_mib=1"]  # two buckets
SAMPLING = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0}
QUERIES = [torch.tensor(ids) for ids in ([5, 6], [7, 8, 9], [10], [11, 12, 13, 14])]


@pytest.fixture(autouse=True)
def short_ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


def make(folder: Path, **arguments: Any) -> PPOTrainer:
    config = PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3, ppo_epochs=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    return PPOTrainer(config, model, tokenizer=AutoTokenizer.from_pretrained(folder), **arguments)


def test_actors_compute_what_one_process_computes(tiny_policy: Path) -> None:
    local, remote = make(tiny_policy), make(tiny_policy, on_ray=[*OPTIONS, "ray.object_store_mib=256"])
    try:
        limits = iter([3, 5])
        responses = remote.generate(QUERIES, lambda: next(limits), batch_size=2, return_prompt=False, **SAMPLING)
        assert [len(response) for response in responses] == [3, 3, 5, 5] or any(0 in ids for ids in responses)
        scores = [torch.tensor(float(score)) for score in (1, -1, 0.5, 2)]
        for step in range(2):
            answers = []
            for trainer in (remote, local):
                np.random.seed(step)  # both draw the same orders of rows
                trainer.kl_ctl.value = 0.3 + step
                answers.append(trainer.step(QUERIES, responses, scores))
            found, wanted = answers
            assert found.keys() == wanted.keys()
            for name in (name for name in found if not name.startswith("time/")):
                if name != "ppo/policy/ratio":  # in no particular order
                    np.testing.assert_allclose(found[name], wanted[name], atol=2e-4, rtol=1e-4, err_msg=name)
        assert remote.kl_ctl.value == pytest.approx(local.kl_ctl.value)
        for found, wanted in zip(remote.model.parameters(), local.model.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        # the engines serve the new weights: what they sample has the log-probabilities of the model that followed
        answer = remote.generate(QUERIES[0], max_new_tokens=4, **SAMPLING)
        assert answer.shape[0] == 1 and answer[0, :2].tolist() == [5, 6]
        with pytest.raises(ValueError, match="engines hold the policy alone"):
            remote.generate(QUERIES[0], generate_ref_response=True, max_new_tokens=4, **SAMPLING)
        with pytest.raises(ValueError, match="stop_strings cannot be honoured on Ray"):
            remote.generate(QUERIES[0], stop_strings=["a"], max_new_tokens=4, **SAMPLING)
    finally:
        remote.close()
    import ray

    assert not ray.is_initialized()
    assert not [name for name in os.listdir(os.environ["RAY_TMPDIR"]) if name.startswith("ppo_ray-")]


def test_what_actors_cannot_honour_raises(tiny_policy: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match="optimizer cannot be honoured on Ray"):
        make(tiny_policy, optimizer=optimizer, on_ray=OPTIONS)
    with pytest.raises(ValueError, match=r"frozen parameters \(.*cannot be honoured on Ray"):
        make(tiny_policy, num_shared_layers=1, on_ray=OPTIONS)
