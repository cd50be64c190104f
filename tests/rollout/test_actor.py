"""When a rollout worker lets its engine sleep; the worker without Ray around it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ppo_ray.config import load_config
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.rollout import actor
from ppo_ray.rollout.actor import RolloutWorker
from ppo_ray.rollout.engine import Completion, GenerationRequest, Sampling
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import WeightSnapshot


class Recorder:
    """An engine that writes down what it is asked."""

    policy_version = 3

    def __init__(self) -> None:
        self.calls: list[str] = []

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        self.calls.append("generate")
        self.sampling = sampling
        return [Completion((5,), (-1.0,), "length") for _ in requests]

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        self.calls.append("load_weights")

    def sleep(self, keep_weights: bool = True) -> None:
        self.calls.append("sleep" if keep_weights else "drop")


@pytest.mark.parametrize(
    ("placement", "calls"),
    [
        ("apart", ["generate", "load_weights", "generate"]),
        ("colocated", ["sleep", "generate", "drop", "load_weights", "generate", "sleep"]),
    ],
)
def test_an_engine_sleeps_when_its_turn_is_over(
    placement: str, calls: list[str], tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    monkeypatch.setattr(actor, "_start_engine", lambda config, path: (engine, None))
    base = ["output_dir=x", f"model.path={tiny_policy}", "prompts.path=p", "reward.path=r"]
    worker = RolloutWorker.__ray_metadata__.modified_class("rollout-0")
    worker.setup(load_config(None, [*base, f"ray.placement={placement}"]))
    prompts = PromptBatch((0, 1), ((7, 8), (9,)))
    table, _ = worker.generate(prompts, 0, 0, keep_weights=False)
    worker.load_weights(WeightManifest(3, "xxh3", ()), [])
    worker.generate(prompts, 0, 0, keep_weights=True)
    assert table.num_rows == 2 and set(table.column("policy_version").to_pylist()) == {3}
    assert engine.calls == calls


@pytest.mark.parametrize(("stop_at_eos", "ids"), [("true", (0, 5, 9)), ("false", ())])
def test_an_engine_is_told_all_that_ends_a_response(
    stop_at_eos: str, ids: tuple[int, ...], tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer's end of sequence is 0; the model declares others too, as models that chat do."""
    folder = shutil.copytree(tiny_policy, tmp_path / "policy")
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 5, 600]}')  # of a vocabulary of 512
    engine = Recorder()
    monkeypatch.setattr(actor, "_start_engine", lambda config, path: (engine, None))
    worker = RolloutWorker.__ray_metadata__.modified_class("rollout-0")
    base = ["output_dir=x", f"model.path={folder}", "prompts.path=p", "reward.path=r"]
    worker.setup(load_config(None, [*base, f"rollout.stop_at_eos={stop_at_eos}", "rollout.temperature=0.5"]))
    worker.generate(PromptBatch((0,), ((7, 8),)), 0, 0)
    assert engine.sampling == Sampling(0.5, ids)


def test_a_character_that_is_begun_in_the_prompt_is_the_responses(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    monkeypatch.setattr(actor, "_start_engine", lambda config, path: (engine, None))
    worker = RolloutWorker.__ray_metadata__.modified_class("rollout-0")
    worker.setup(load_config(None, ["output_dir=x", f"model.path={tiny_policy}", "prompts.path=p", "reward.path=r"]))
    first, second = AutoTokenizer.from_pretrained(tiny_policy)("影")["input_ids"][:2], (5,)
    table, _ = worker.generate(PromptBatch((0, 1), ((36, *first), second)), 0, 0)
    assert table.column("prompt").to_pylist()[0] == "D" and table.column("response").to_pylist()[0] == "\ufffd%"


def test_the_members_of_a_group_are_sampled_apart_and_the_first_as_if_alone(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever samples them, and however many there are."""
    monkeypatch.setattr(actor, "_start_engine", lambda config, path: (Recorder(), None))
    worker = RolloutWorker.__ray_metadata__.modified_class("rollout-0")
    base = ["output_dir=x", f"model.path={tiny_policy}", "prompts.path=p", "reward.path=r"]
    worker.setup(load_config(None, [*base, "rollout.min_response_tokens=1"]))
    alone = PromptBatch((7, 8), ((7, 8), (9,)))

    def sample(prompts: PromptBatch) -> list[tuple[int, int]]:
        table, _ = worker.generate(prompts, 3, 0)
        return list(zip(table.column("sample_id").to_pylist(), table.column("seed").to_pylist(), strict=True))

    single, pairs, fours = (sample(batch) for batch in (alone, alone.repeat(2), alone.repeat(4)))
    assert [seed for _, seed in pairs] == [seed for index, (_, seed) in enumerate(fours) if index % 4 < 2]
    assert [seed for _, seed in pairs[::2]] == [seed for _, seed in single]
    assert len({seed for _, seed in fours}) == 8
    assert [sample_id for sample_id, _ in fours] == [28, 29, 30, 31, 32, 33, 34, 35]
    assert sample(alone.repeat(4).split(2)[1]) == fours[4:]
    table, _ = worker.generate(alone.repeat(2), 3, 0)
    assert table.column("group_id").to_pylist() == [7, 7, 8, 8]
