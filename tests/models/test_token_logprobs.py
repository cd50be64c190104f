import pytest
import torch

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
