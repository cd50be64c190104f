"""Fewer kernels: the same states and gradients; norms only where a model's are that function."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from ppo_ray.models.fusion import compile_layers, fuse_norms, measure_compilation
from tests.models.test_attention import draw_row, make_policy

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_a_models_norms_become_one_kernel_each(dtype: torch.dtype, close: float) -> None:
    policy, rows = make_policy("llama"), draw_row([(3, 5), (2, 2)])
    policy.causal_lm.to(dtype)
    names, found = policy.state_dict().keys(), []
    for number in (0, 5):  # two norms per layer, and the last one
        assert number == 0 or fuse_norms(policy, CPU) == number
        states = policy(rows).states
        found.append((states, *torch.autograd.grad(states.float().sum(), list(policy.causal_lm.model.parameters()))))
    for its, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, atol=close * float(its.detach().abs().max()), rtol=0)
    assert policy.state_dict().keys() == names


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (LlamaRMSNorm, 1),
        (GemmaRMSNorm, 0),  # times 1 + weight
        (Olmo2RMSNorm, 0),  # the product is rounded once
        (torch.nn.RMSNorm, 0),  # the same
    ],
)
def test_another_function_or_another_rounding_is_left_alone(kind: Any, number: int) -> None:
    with torch.device("meta"):
        norms = torch.nn.Sequential(kind(64, eps=1e-6), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    assert fuse_norms(norms, CPU) == number


@pytest.mark.slow
def test_layers_compiled_for_a_cpu_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's code generator and the machine's C++ compiler, which take a minute; tests/learner has the rest."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    policy, found = make_policy("llama"), []
    compile_layers(policy)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(disable=False):  # as tests/conftest.py has it
        for stance in ("force_eager", "default"):
            for sizes in ([(3, 5), (2, 2)], [(4, 1), (1, 9), (7, 7)]):
                with torch.compiler.set_stance(stance):
                    output = policy(draw_row(sizes))
                    loss = output.logprobs.sum() + output.values.sum()
                    gradients = torch.autograd.grad(loss, list(policy.parameters()))
                found.append((output.logprobs, output.values, *gradients))
                pieces = measure_compilation().get("learner/compiled_pieces")
                assert (stance == "force_eager") or pieces == 4  # the parts of a layer around its attention
    for its, mine in zip([*found[0], *found[1]], [*found[2], *found[3]], strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5 * float(its.detach().abs().max()), rtol=0)
    assert any(not torch.equal(its, mine) for its, mine in zip(found[0], found[2], strict=True))
