"""Log-probabilities, entropies and the full KL against plain formulas and by hand."""

import pytest
import torch

from ppo_ray.models import token_logprobs as module
from ppo_ray.models.token_logprobs import full_kl, token_logprobs


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 130, 600])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_figures_and_gradients_are_those_of_the_plain_formula(num_tokens: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    distribution = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / temperature)
    entropy_upstream = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    inputs = (hidden, weight, bias)
    wanted = torch.autograd.grad((distribution.log_prob(ids) * upstream).sum(), inputs, retain_graph=True)
    total = (distribution.log_prob(ids) * upstream + distribution.entropy() * entropy_upstream).sum()
    wanted_of_both = torch.autograd.grad(total, inputs, retain_graph=True)
    wanted_of_entropy = torch.autograd.grad((distribution.entropy() * entropy_upstream).sum(), inputs)
    logprobs, entropies = token_logprobs(hidden, weight, bias, ids, temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(ids))
    torch.testing.assert_close(entropies, distribution.entropy())
    for gradients, loss_of in (
        (wanted, lambda logprobs, entropies: logprobs * upstream),
        (wanted_of_both, lambda logprobs, entropies: logprobs * upstream + entropies * entropy_upstream),
        (wanted_of_entropy, lambda logprobs, entropies: entropies * entropy_upstream),
    ):
        loss = loss_of(*token_logprobs(hidden, weight, bias, ids, temperature)).sum()
        for found, gradient in zip(torch.autograd.grad(loss, inputs), gradients, strict=True):
            torch.testing.assert_close(found, gradient)


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
def test_chunks_and_inference_mode_change_no_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio of the first mini-batch is 1 only if figures with and without gradient are the same."""
    hidden, weight = torch.randn(7, 16), torch.randn(50, 16, requires_grad=True)
    monkeypatch.setattr(module, "_CHUNK_TOKENS", chunk)
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
    """The operator is CUDA's alone; here it stands on a CPU. Rounded to bfloat16 the logits would be 0.03 off."""
    operator = torch.library.Library("aten", "IMPL")
    products = []

    def mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        products.append(dtype)
        return out.copy_(a.to(dtype) @ b.to(dtype))

    operator.impl("mm.dtype_out", mm, "CPU")
    monkeypatch.setattr(module, "_keeps_float32", lambda hidden: hidden.dtype == torch.bfloat16)
    hidden, weight = (torch.randn(size, 64).mul(2).bfloat16().requires_grad_() for size in (7, 50))
    offset = torch.randn(50).bfloat16() if bias else None
    logits = hidden.float() @ weight.float().T + (offset.float() if offset is not None else 0)
    logprobs, _ = token_logprobs(hidden, weight, offset, torch.arange(7), 0.5)
    torch.testing.assert_close(logprobs, (logits / 0.5).log_softmax(-1)[range(7), range(7)], atol=2e-5, rtol=1e-5)
    kl = full_kl((hidden, weight, offset), (hidden.flip(0), weight, offset), 0.5)
    p, q = (logits / 0.5).log_softmax(-1), (logits.flip(0) / 0.5).log_softmax(-1)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), atol=2e-5, rtol=1e-5)
    assert products == [torch.float32] * 3
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    del operator


def test_a_second_backward_pass_is_refused() -> None:
    """The first turned the probabilities into gradients in place."""
    weight = torch.randn(5, 3, requires_grad=True)
    total = token_logprobs(torch.randn(2, 3), weight, None, torch.tensor([1, 2]), 1.0)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be run once"):
        total.backward()
