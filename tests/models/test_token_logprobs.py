import pytest
import torch

from ppo_ray.models import token_logprobs as module
from ppo_ray.models.token_logprobs import token_logprobs


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 130])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_figures_and_gradients_are_those_of_the_plain_formula(num_tokens: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    distribution = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / temperature)
    wanted = torch.autograd.grad((distribution.log_prob(ids) * upstream).sum(), (hidden, weight, bias))
    logprobs, entropies = token_logprobs(hidden, weight, bias, ids, temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(ids))
    torch.testing.assert_close(entropies, distribution.entropy())
    for found, gradient in zip(
        torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight, bias)), wanted, strict=True
    ):
        torch.testing.assert_close(found, gradient)


def test_by_hand() -> None:
    # logits (0, ln 3): probabilities 1/4 and 3/4
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0986123]])
    logprobs, entropies = token_logprobs(hidden, weight, None, torch.tensor([1]), 1.0)
    assert float(logprobs[0]) == pytest.approx(-0.2876821, abs=1e-6)
    assert float(entropies[0]) == pytest.approx(0.5623351, abs=1e-6)


def test_wrong_shapes_are_refused() -> None:
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
    assert not with_gradient[1].requires_grad


def test_a_tied_weight_gets_both_gradients() -> None:
    weight, ids = torch.randn(11, 5, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 3])
    plain = (weight[ids] @ weight.T).log_softmax(-1)[range(3), ids]
    found = torch.autograd.grad(token_logprobs(weight[ids], weight, None, ids, 1.0)[0].sum(), weight)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), weight))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    weight = torch.tensor([[1.0], [0.5]])
    logprobs, entropies = token_logprobs(torch.tensor([[1e4]]), weight, None, torch.tensor([1]), 1.0)
    assert logprobs.tolist() == [-5000.0]
    assert entropies.tolist() == [0.0]


def test_autocast_multiplies_in_bfloat16_and_keeps_the_softmax_in_float32() -> None:
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, None, torch.arange(7), 1.0)
    wanted = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1)[range(7), range(7)]
    torch.testing.assert_close(logprobs, wanted)
    logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_a_second_backward_pass_is_refused() -> None:
    """The first turned the probabilities into gradients in place."""
    weight = torch.randn(5, 3, requires_grad=True)
    total = token_logprobs(torch.randn(2, 3), weight, None, torch.tensor([1, 2]), 1.0)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be run once"):
        total.backward()
