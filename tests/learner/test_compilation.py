"""Compiled layers compute the same update, whatever stands around them; what cannot be compiled is refused.

Most tests leave out torch's code generator: what is traced, and how often, is the same without it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_ray.config import LoraConfig
from ppo_ray.errors import InputError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models import fusion
from ppo_ray.models.fusion import measure_compilation
from tests.learning import largest_difference, load_learner, make_table, weights

LENGTHS = [(23, 5), (4, 3), (21, 2), (25, 9), (3, 6), (9, 1)]  # three prompts have 20 tokens in common
Backend = str | Callable[..., Any]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    with torch._dynamo.config.patch(disable=False):  # as tests/conftest.py has it
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def trace_by(backend: Backend, patch: pytest.MonkeyPatch) -> None:
    """Leave traced pieces to a backend: `eager` runs them as they are."""
    patch.setattr(
        fusion, "_compile", partial(torch.compile, **fusion._compile.keywords | {"options": None, "backend": backend})
    )


def load(folder: Path, model: dict[str, Any], **learner: Any) -> PPOLearner:
    return load_learner(folder, {"dtype": "float32"} | model, {"microbatch_tokens": 64} | learner, {"epochs": 2})


def learn(learner: PPOLearner) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    learner.update(make_table(len(LENGTHS), lengths=LENGTHS), 0)
    metrics = learner.update(make_table(12), 1).metrics
    return weights(learner), metrics


def count_pieces() -> float:
    return measure_compilation().get("learner/compiled_pieces", 0)


@pytest.mark.parametrize(
    ("model", "learner"),
    [({}, {}), ({"critic": "separate", "lora": LoraConfig(rank=4)}, {"gradient_checkpointing": True})],
)
def test_the_update_is_the_same_and_no_length_of_rows_compiles_anew(
    tiny_policy: Path, model: dict[str, Any], learner: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_by("eager", monkeypatch)
    model = model | {"dtype": "float64"}
    wanted, figures = learn(load(tiny_policy, model, **learner))
    before = count_pieces()
    compiled = load(tiny_policy, model, compile=True, **learner)
    pieces = count_pieces()
    found, metrics = learn(compiled)
    assert found.keys() == wanted.keys()
    assert largest_difference(found, wanted) < 1e-8
    assert metrics["loss/total"] == pytest.approx(figures["loss/total"], rel=1e-6)
    assert metrics["learner/compiled_pieces"] == count_pieces() == pieces > before
    assert not any("_orig_mod" in name for name in compiled._policy.state_dict())


def learn_as_one_of(ranks: Ranks | None, folder: Path, compiles: bool) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=False):
        trace_by("eager", patch)
        options = {"compile": compiles, "sharding": "fsdp2", "gradient_checkpointing": True, "microbatch_tokens": 64}
        found, _ = learn(load_learner(folder, {"dtype": "float64"}, options, {"epochs": 2}, ranks))
        assert bool(count_pieces()) == compiles
    return found


@pytest.mark.slow
def test_ranks_compile_the_layers_that_they_share(tiny_policy: Path, crew: Any) -> None:
    plain, compiled = (crew.run(learn_as_one_of, tiny_policy, compiles) for compiles in (False, True))
    for wanted, found in zip(plain, compiled, strict=True):
        assert not isinstance(found, str), found
        assert largest_difference(found, wanted) < 1e-8


def fail(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("No working C++ compiler found")


def err(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return lambda *arguments: [part * 1.01 if isinstance(part, torch.Tensor) else part for part in graph(*arguments)]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (fail, r"cannot be compiled on this machine .*No working C\+\+ compiler found.*leave out learner\.compile"),
        (err, r"differ by .* when its layers are compiled, more than 3e-04: leave out learner\.compile"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    tiny_policy: Path, backend: Backend, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_by(backend, monkeypatch)
    with pytest.raises(InputError, match=message):
        load(tiny_policy, {}, compile=True)


def test_a_switch_that_turns_compiling_off_is_named(tiny_policy: Path) -> None:
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(disable=True), pytest.raises(InputError, match="TORCH_COMPILE_DISABLE"):
        load(tiny_policy, {}, compile=True)
