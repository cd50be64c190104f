"""What a trainer over Ray actors takes, and what it makes. Starts no actor."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ppo_ray.errors import InputError, WorkerError
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.rollout.group import RolloutGroup
from ppo_ray.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_ray.trl.generation import GenerateCall
from ppo_ray.trl.on_ray import OnRay, _make_config
from ppo_ray.weights.acks import Agreement


def test_options_of_the_actors_are_taken(tmp_path: Path) -> None:
    config = _make_config(
        PPOConfig(batch_size=6, mini_batch_size=3), str(tmp_path), ["rollout.workers=3", "learner.threads=1"]
    )
    assert (config.rollout.workers, config.learner.threads, config.rollout.batch_size) == (3, 1, 6)


@pytest.mark.parametrize(
    "option", ["ppo.clip_range=0.1", "model.reference_path=elsewhere", "reward.workers=2", "seed=3", "nonsense"]
)
def test_what_is_the_scripts_own_is_refused_not_overwritten(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"on_ray: {option} cannot be set here"):
        _make_config(PPOConfig(), str(tmp_path), ["rollout.workers=2", option])


def test_a_temperature_that_vllm_would_raise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rollout.temperature: 0.005 is below 0.01"):
        _make_config(PPOConfig(), str(tmp_path), ["rollout.temperature=0.005"])
    _make_config(PPOConfig(), str(tmp_path), ["rollout.temperature=0.005", "rollout.engine=hf"])


@pytest.fixture
def start(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what makes a backend up to the moment that Ray would be started."""

    class Started(Exception):
        pass

    def ray_session(config: Any) -> None:
        raise Started

    monkeypatch.setattr("ppo_ray.trl.on_ray.ray_session", ray_session)

    def start(declared: Any, *options: str, eos_token: str | None = "<eos>") -> OnRay | None:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy)
        model.pretrained_model.generation_config.eos_token_id = declared
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
        tokenizer.eos_token = eos_token
        backend = OnRay.__new__(OnRay)
        with pytest.raises(Started):
            backend.__init__(PPOConfig(), model, model, tokenizer, [f"output_dir={tmp_path}", *options])
        return backend

    return start


def test_a_model_that_nothing_ends_is_refused_before_ray_is_started(start: Any) -> None:
    with pytest.raises(InputError, match="nothing can end a response; name one .* or set rollout.stop_at_eos=false"):
        start(None, eos_token=None)
    start(None, "rollout.stop_at_eos=false", eos_token=None)
    start(5, eos_token=None)


def test_ends_are_those_of_the_engines(start: Any) -> None:
    def check(backend: OnRay, given: Any, ends: tuple[int, ...]) -> None:
        backend._check(GenerateCall([], None, 1, True, {"eos_token_id": given}, ends), by_reference=False)

    backend = start([5, 9, 600])
    check(backend, [9, 5, 0], (0, 5, 9))
    with pytest.raises(ValueError, match=r"eos_token_id=9: on Ray responses end at \[0, 5, 9\]"):
        check(backend, 9, (9,))
    backend = start([5, 9], "rollout.stop_at_eos=false")
    check(backend, 100_000, ())
    with pytest.raises(ValueError, match=r"on Ray responses end at \[\]"):
        check(backend, 0, (0,))


@pytest.mark.parametrize(("options", "sent"), [((), ["moved", "own"]), (("rollout.self_check=false",), ["own"])])
def test_engines_are_checked_before_they_are_used(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], sent: list[str]
) -> None:
    """With prompts of the model's own tokens, which fit into its context."""
    calls: list[str] = []

    class Learner:
        def __init__(self, *given: Any) -> None: ...

        def setup(self) -> None: ...

        def publish(self, moved: bool = False) -> str:
            return "moved" if moved else "own"

        def compare(self, generated: PromptBatch) -> list[Agreement]:
            assert all(0 <= token < 512 for prompt in generated.prompt_ids for token in prompt)
            assert generated.max_response_tokens is not None
            sizes = zip(generated.prompt_ids, generated.max_response_tokens, strict=True)
            assert all(0 < len(prompt) <= 13 - limit for prompt, limit in sizes)
            return [Agreement("rollout-0", to_moved=off, to_own=3.0, move=3.0)]

        def close(self) -> None:
            calls.append("learner closed")

    class Engines(RolloutGroup):
        def __init__(self, config: Any, *given: Any) -> None:
            self._config, self._group = config, None  # type: ignore[assignment]

        def setup(self) -> None: ...  # type: ignore[override]

        def load_weights(self, weights: Any) -> float:
            calls.append(weights)
            return 0.0

        def close(self) -> None:
            calls.append("engines closed")

    monkeypatch.setattr("ppo_ray.rollout.group.Shards", lambda group, doing, shards, timeout_s: shards[0].prompts)
    monkeypatch.setattr("ppo_ray.rollout.group._generate_call", lambda prompts, *rest: SimpleNamespace(prompts=prompts))
    for name, stand_in in (("LearnerGroup", Learner), ("RolloutGroup", Engines)):
        monkeypatch.setattr(f"ppo_ray.trl.on_ray.{name}", stand_in)
    for name in ("ray_session", "reserve"):
        monkeypatch.setattr(f"ppo_ray.trl.on_ray.{name}", lambda *given: contextlib.nullcontext())

    def start() -> OnRay:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy)
        given = [f"output_dir={tmp_path}", "rollout.max_context=13", "rollout.max_response_tokens=5", *options]
        return OnRay(PPOConfig(), model, model, AutoTokenizer.from_pretrained(tiny_policy), given)

    off = 1e-5
    start().close()
    assert calls == [*sent, "learner closed", "engines closed"]
    off = 0.4
    if "moved" in sent:
        calls.clear()
        with pytest.raises(
            WorkerError, match=r"rollout-0 is 4.0e-01 nats per token off the learner .* of another policy"
        ):
            start()
        assert calls == ["moved", "learner closed", "engines closed"]


class Remote:
    """Stands in for the backend on Ray: keeps what it is given."""

    kl_coef = 0.25

    def __init__(self, *given: Any) -> None:
        self.given = given


@pytest.fixture
def make(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(*given: Any) -> None:
        pytest.fail("a learner is made in this process too")

    monkeypatch.setattr("ppo_ray.trl.on_ray.OnRay", Remote)
    monkeypatch.setattr("ppo_ray.trl.trainer.InProcess", refuse)

    def make(**arguments: Any) -> PPOTrainer:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy)
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
        return PPOTrainer(PPOConfig(), model, tokenizer=tokenizer, on_ray=["rollout.workers=3"], **arguments)

    return make


def test_only_the_backend_on_ray_is_made(make: Any) -> None:
    trainer = make()
    assert trainer.kl_ctl.value == 0.25
    config, model, ref_model, tokenizer, options = trainer._backend.given
    assert (config, model, ref_model) == (trainer.config, trainer.model, trainer.ref_model)
    assert (tokenizer, options) == (trainer.tokenizer, ["rollout.workers=3"])


def test_an_optimizer_and_a_scheduler_are_refused(make: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match="optimizer cannot be honoured on Ray"):
        make(optimizer=optimizer)
    with pytest.raises(ValueError, match="lr_scheduler cannot be honoured on Ray"):
        make(lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1))
