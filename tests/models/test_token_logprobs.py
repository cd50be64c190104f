"""Log-probabilities, entropies and the full KL against plain formulas and by hand."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_ray.models import token_logprobs as module
from ppo_ray.models.token_logprobs import count_rows, full_kl, token_logprobs


@contextlib.contextmanager
def limits(kept: int, block: int = 512, chunk: int = 64) -> Iterator[None]:
    """Keep at most so many probabilities, and go through the logits by so many rows."""
    with (
        mock.patch.object(module, "_KEPT_ENTRIES", kept),
        mock.patch.object(module, "count_rows", lambda *_: (block, chunk)),
    ):
        yield


def make_inputs(num_tokens: int, num_entries: int, has_bias: bool, dtype: torch.dtype = torch.float64) -> Any:
    """Return hidden states, weight and bias that need a gradient, and token ids."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, 8), (num_entries, 8), *[(num_entries,)] * has_bias]
    factors = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
    return factors, torch.randint(num_entries, (num_tokens,), generator=generator)


def weigh(logprobs: torch.Tensor, entropies: torch.Tensor, of_logprobs: bool, of_entropies: bool) -> torch.Tensor:
    """Return a sum with other weights for each token."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    return of_logprobs * (logprobs * weights).sum() + of_entropies * (entropies * weights.flip(0)).sum()


@given(
    num_tokens=st.integers(1, 40),
    num_entries=st.integers(2, 30),
    kept=st.sampled_from([0, 10**6]),
    rows=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    temperature=st.sampled_from([1.0, 0.7]),
    has_bias=st.booleans(),
    upstream=st.sampled_from([(True, False), (True, True), (False, True)]),
)
def test_figures_and_gradients_are_those_of_the_plain_formula(
    num_tokens: int,
    num_entries: int,
    kept: int,
    rows: tuple[int, int],
    temperature: float,
    has_bias: bool,
    upstream: tuple[bool, bool],
) -> None:
    factors, ids = make_inputs(num_tokens, num_entries, has_bias)
    logits = torch.nn.functional.linear(*factors) / temperature
    plain = torch.distributions.Categorical(logits=logits)
    wanted = torch.autograd.grad(weigh(plain.log_prob(ids), plain.entropy(), *upstream), factors)
    with limits(kept, *rows):
        hidden, weight, bias = *factors, *[None] * (not has_bias)
        logprobs, entropies = token_logprobs(hidden, weight, bias, ids, temperature)
        found = torch.autograd.grad(weigh(logprobs, entropies, *upstream), factors)
    for one, other in ((logprobs, plain.log_prob(ids)), (entropies, plain.entropy()), *zip(found, wanted, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [0, 10**6])
def test_gradients_are_finite_differences(kept: int) -> None:
    (hidden, weight, bias), ids = make_inputs(9, 20, True)
    steps = [1e-6 * torch.randn_like(factor) for factor in (hidden, weight, bias)]

    def total(sign: int) -> torch.Tensor:
        moved = (factor + sign * step for factor, step in zip((hidden, weight, bias), steps, strict=True))
        return weigh(*token_logprobs(*moved, ids, 0.7), True, True)

    with limits(kept, 4, 2):
        gradients = torch.autograd.grad(total(0), (hidden, weight, bias))
        rise = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
        torch.testing.assert_close((total(1) - total(-1)) / 2, rise, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_entropies", [False, True])
def test_logits_computed_again_give_the_gradients_of_kept_ones(dtype: torch.dtype, of_entropies: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator).to(dtype).requires_grad_() for size in (200, 300))
    ids = torch.randint(300, (200,), generator=generator)
    found = []
    for kept in (10**6, 0):
        with limits(kept, 48, 7):
            figures = token_logprobs(hidden, weight, None, ids, 0.7)
            found.append([*figures, *torch.autograd.grad(weigh(*figures, True, of_entropies), (hidden, weight))])
    for place, (one, other) in enumerate(zip(*found, strict=True)):
        assert one.dtype == other.dtype
        if place < 2:
            assert one.tolist() == other.tolist()
        else:
            rounding = torch.finfo(dtype).eps * float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=2 * rounding)


class Largest(TorchDispatchMode):
    """Finds the largest tensor that an operation returns."""

    num_entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.num_entries = max(self.num_entries, *sizes, 0)
        return found


@pytest.mark.parametrize(("num_tokens", "expected"), [(1024, 1024), (1025, 512)])
def test_the_logits_of_long_responses_are_never_whole(num_tokens: int, expected: int) -> None:
    """At a vocabulary of 262,144 the probabilities of 1,024 tokens are kept: 1 GiB."""
    with mock.patch.object(module, "count_rows", lambda *_: (512, 512)), FakeTensorMode(), Largest() as largest:
        hidden, weight = (torch.zeros(size, 8, requires_grad=True) for size in (num_tokens, 1 << 18))
        logprobs, entropies = token_logprobs(hidden, weight, None, torch.zeros(num_tokens, dtype=torch.int64), 1.0)
        (logprobs - entropies).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert largest.num_entries == expected << 18


def test_rows_are_counted_for_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert count_rows(cpu, 49_152) == (512, (torch.get_num_threads() << 19) // 49_152)
    assert count_rows(gpu, 49_152) == (5461, 1365)
    assert count_rows(gpu, 152_000) == (1766, 441)
    assert count_rows(cpu, 1 << 30)[1] == count_rows(gpu, 1 << 30)[0] == 1


@pytest.mark.parametrize("kept", [0, 10**6])
def test_tokens_that_are_never_drawn_make_nothing_nan(kept: int) -> None:
    """A bias of -inf takes a token out of the vocabulary: all is as without it."""
    (hidden, weight, bias), ids = make_inputs(9, 20, True, torch.float32)
    ids %= 19
    banned = torch.where(torch.arange(20) < 19, bias, -torch.inf)
    with limits(kept, 4, 2):
        figures = token_logprobs(hidden, weight, banned, ids, 0.7)
        wanted = token_logprobs(hidden, weight[:19], bias[:19], ids, 0.7)
        for one, other in zip(figures, wanted, strict=True):
            torch.testing.assert_close(one, other)
        gradients = [
            torch.autograd.grad(weigh(*each, True, True), (hidden, weight, bias)) for each in (figures, wanted)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        assert token_logprobs(hidden, weight, banned, torch.full_like(ids, 19), 1.0)[0].tolist() == [-torch.inf] * 9
    reference = torch.randn(9, 8), torch.randn(20, 8), None
    kl = full_kl((hidden, weight, banned), reference, 0.7)
    p, q = (
        torch.distributions.Categorical(logits=torch.nn.functional.linear(*factors) / 0.7)
        for factors in ((hidden, weight, banned), reference)
    )
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))


def test_token_logprobs_by_hand() -> None:
    # logits (0, ln 3): probabilities 1/4 and 3/4
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0986123]])
    logprobs, entropies = token_logprobs(hidden, weight, None, torch.tensor([1]), 1.0)
    assert float(logprobs[0]) == pytest.approx(-0.2876821, abs=1e-6)
    assert float(entropies[0]) == pytest.approx(0.5623351, abs=1e-6)


def test_wrong_shapes_and_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, H\]"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(5, 4), None, torch.zeros(2, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(5, 3), None, torch.zeros(2, dtype=torch.int64), 0)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("kept", [0, 10**6])
def test_chunks_and_inference_mode_change_no_bit(chunk: int, kept: int) -> None:
    """The ratio of the first mini-batch is 1 only if figures with and without gradient are the same."""
    hidden, weight = torch.randn(7, 16), torch.randn(50, 16, requires_grad=True)
    with limits(kept, 4, chunk):
        with_gradient = token_logprobs(hidden, weight, None, torch.arange(7), 0.7)
        with torch.inference_mode():
            without = token_logprobs(hidden, weight, None, torch.arange(7), 0.7)
    assert [x.tolist() for x in with_gradient] == [x.tolist() for x in without]


def test_a_tied_weight_gets_both_gradients() -> None:
    weight, ids = torch.randn(11, 5, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 3])
    plain = (weight[ids] @ weight.T).log_softmax(-1)[range(3), ids]
    found = torch.autograd.grad(token_logprobs(weight[ids], weight, None, ids, 1.0)[0].sum(), weight)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), weight))


@pytest.mark.parametrize("num_tokens", [1, 130])
def test_full_kl_is_the_divergence_of_the_two_distributions(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)

    def make(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(
            torch.randn(*shape, generator=generator).double() for shape in ((num_tokens, size), (11, size), (11,))
        )

    policy, reference = make(8), make(5)
    p, q = (
        torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / 0.7)
        for hidden, weight, bias in (policy, reference)
    )
    torch.testing.assert_close(full_kl(policy, reference, 0.7), torch.distributions.kl_divergence(p, q))
    assert full_kl(policy, policy, 1.0).abs().max() < 1e-12
    with pytest.raises(ValueError, match="they must agree"):
        full_kl(policy, (reference[0], reference[1][:-1], reference[2][:-1]), 1.0)


def test_full_kl_by_hand() -> None:
    # p = (1/4, 3/4), q = (1/2, 1/2)
    one, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0986123]])
    found = full_kl((one, weight, None), (one, torch.zeros(2, 1), None), 1.0)
    assert float(found[0]) == pytest.approx(0.1308120, abs=1e-6)  # ln 2 - 0.5623351


def test_an_unlikely_tokens_entropy_has_a_finite_gradient() -> None:
    hidden = torch.tensor([[1e4]], requires_grad=True)
    _, entropies = token_logprobs(hidden, torch.tensor([[1.0], [0.5]]), None, torch.tensor([1]), 1.0)
    entropies.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_large_logits_neither_overflow_nor_vanish() -> None:
    weight = torch.tensor([[1.0], [0.5]])
    logprobs, entropies = token_logprobs(torch.tensor([[1e4]]), weight, None, torch.tensor([1]), 1.0)
    assert logprobs.tolist() == [-5000.0]
    assert entropies.tolist() == [0.0]


def test_bfloat16_is_multiplied_as_it_is_and_the_softmax_is_in_float32() -> None:
    hidden, weight = (torch.randn(size, 16).bfloat16().requires_grad_() for size in (7, 50))
    logprobs, _ = token_logprobs(hidden, weight, None, torch.arange(7), 1.0)
    wanted = (hidden @ weight.T).float().log_softmax(-1)[range(7), range(7)]
    torch.testing.assert_close(logprobs, wanted)
    logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_a_gpus_products_of_bfloat16_are_kept_in_float32(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """The operators are CUDA's alone; here they stand on a CPU. Rounded to bfloat16 the logits would be 0.03 off."""
    operator = torch.library.Library("aten", "IMPL")
    products, sums = [], []

    def mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        products.append(dtype)
        return out.copy_(a.to(dtype) @ b.to(dtype))

    def addmm(
        total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor
    ) -> torch.Tensor:
        sums.append(dtype)
        return out.copy_(total + a.to(dtype) @ b.to(dtype))

    operator.impl("mm.dtype_out", mm, "CPU")
    operator.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(module, "_keeps_float32", lambda hidden: hidden.dtype == torch.bfloat16)
    hidden, weight = (torch.randn(size, 64).mul(2).bfloat16().requires_grad_() for size in (7, 50))
    offset = torch.randn(50).bfloat16() if bias else None
    logits = hidden.float() @ weight.float().T + (offset.float() if offset is not None else 0)
    ids = torch.arange(7)
    logprobs, _ = token_logprobs(hidden, weight, offset, ids, 0.5)
    torch.testing.assert_close(logprobs, (logits / 0.5).log_softmax(-1)[ids, ids], atol=2e-5, rtol=1e-5)
    kl = full_kl((hidden, weight, offset), (hidden.flip(0), weight, offset), 0.5)
    p, q = (logits / 0.5).log_softmax(-1), (logits.flip(0) / 0.5).log_softmax(-1)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), atol=2e-5, rtol=1e-5)
    assert products == [torch.float32] * 3
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    with limits(0, 3, 2):
        again = torch.autograd.grad(token_logprobs(hidden, weight, offset, ids, 0.5)[0].sum(), (hidden, weight))
    assert (len(products), sums) == (3 + 2 * 3, [torch.float32] * 3)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2**-7 * float(other.abs().max()))
        assert one.dtype == torch.bfloat16
    del operator


def test_a_second_backward_pass_is_refused() -> None:
    """The first turned the probabilities into gradients in place."""
    weight = torch.randn(5, 3, requires_grad=True)
    total = token_logprobs(torch.randn(2, 3), weight, None, torch.tensor([1, 2]), 1.0)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be run once"):
        total.backward()
