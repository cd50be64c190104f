"""PPO for language models on one page: sample, score, estimate advantages, update.

A tiny Llama with random weights learns to count. Prompts are random digits; a response gets one point for each digit
that is one more than the digit before it (0 follows 9). It needs torch and transformers alone, and less than a minute:

    python examples/ppo_in_one_file.py

This is the algorithm of `ppo_ray` with its default options, without its checks for runs that go wrong. The test
`tests/learner/test_one_file.py` takes both through the same updates and compares the weights.

Shapes: B sequences, T tokens of prompt and response, R response tokens, V vocabulary, H hidden. Rows are padded on the
right. Attention is causal, so no token sees the padding and no attention mask is needed.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

NUM_STEPS = 60
BATCH_SIZE = 64  # sequences per step
MINIBATCH_SIZE = 32  # sequences per optimizer step
EPOCHS = 4  # passes over the sequences of a step
LEARNING_RATE = 1e-3  # for a tiny model; 1e-5 suits a pretrained one
GAMMA = 1.0  # discount per token
GAE_LAMBDA = 0.95
CLIP_RANGE = 0.2  # of the probability ratio, around 1
VALUE_CLIP_RANGE = 0.2  # of the value, around the old one
VALUE_COEF = 0.1
KL_COEF = 0.2  # in the first step; then it adapts
KL_TARGET = 6.0  # nats per sequence
KL_HORIZON = 10_000  # sequences; the longer, the slower kl_coef adapts

EOS = 10  # the digits are the tokens 0 to 9; EOS also pads
MAX_RESPONSE_LENGTH = 8  # tokens, EOS included


class ActorCritic(torch.nn.Module):
    """A causal language model, which is the policy, and a linear value head on its last hidden state."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm.eval()  # no dropout: the ratio of new to old probabilities must start at 1
        self.value_head = torch.nn.Linear(causal_lm.config.hidden_size, 1, dtype=causal_lm.dtype)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return log pi(token) and V(prefix before it) of the response tokens: `[B, R]` each, 0 outside the mask."""
        row = torch.arange(len(tokens))[:, None]  # [B, 1]
        output = self.causal_lm(tokens, output_hidden_states=True)
        logits = output.logits[row, positions - 1]  # [B, R, V]; position t - 1 predicts token t
        hidden = output.hidden_states[-1][row, positions - 1]  # [B, R, H]
        logprobs = Categorical(logits=logits).log_prob(tokens[row, positions])
        return logprobs * mask, self.value_head(hidden)[..., 0] * mask


class Responses(NamedTuple):
    """What the policy sampled."""

    tokens: Tensor  # [B, T] int64: prompt, response, padding
    positions: Tensor  # [B, R] int64: where the response tokens are in their row
    mask: Tensor  # [B, R] bool: True on response tokens, EOS included


@torch.no_grad()
def sample(policy: ActorCritic, prompts: list[Tensor]) -> Responses:
    """Sample a response to each prompt, token by token, from the full softmax at temperature 1 (no KV cache)."""
    row = torch.arange(len(prompts))  # [B]
    starts = torch.tensor([len(prompt) for prompt in prompts])  # [B]
    ends, running = starts.clone(), torch.ones_like(starts, dtype=torch.bool)
    tokens = pad(pad_sequence(prompts, batch_first=True, padding_value=EOS), (0, MAX_RESPONSE_LENGTH), value=EOS)
    for _ in range(MAX_RESPONSE_LENGTH):
        logits = policy.causal_lm(tokens).logits[row, ends - 1]  # [B, V]
        token = Categorical(logits=logits).sample()
        tokens[row, ends] = torch.where(running, token, EOS)
        ends += running
        running &= token != EOS
    positions = starts[:, None] + torch.arange(MAX_RESPONSE_LENGTH)
    return Responses(tokens, positions, mask=positions < ends[:, None])  # by length, not by id: EOS may be padding


def score(responses: Responses) -> Tensor:
    """Count the digits of each response that are one more than the digit before them: `[B]`."""
    tokens, positions, mask = responses
    previous, token = tokens.gather(1, positions - 1), tokens.gather(1, positions)  # [B, R]
    return ((token == (previous + 1) % 10) & mask).sum(1).float()


class Experience(NamedTuple):
    """What the policy learns from; all `[B, R]`, 0 outside the mask."""

    logprobs: Tensor  # by the policy before the update
    values: Tensor  # likewise
    kl: Tensor  # log-ratio of policy and reference
    advantages: Tensor  # whitened
    returns: Tensor


@torch.no_grad()
def make_experience(
    policy: ActorCritic, reference: ActorCritic, responses: Responses, scores: Tensor, kl_coef: float
) -> Experience:
    """Work out what each token was worth, from the two models' probabilities, the values and the scores."""
    logprobs, values = policy(*responses)
    ref_logprobs, _ = reference(*responses)

    # r_t = -kl_coef * (log pi(token_t) - log pi_ref(token_t)), and the score on the last token
    kl = logprobs - ref_logprobs
    rewards = -kl_coef * kl
    last = responses.mask.sum(1) - 1
    rewards[torch.arange(len(scores)), last] += scores

    advantages, returns = estimate_advantages(rewards, values, responses.mask)
    return Experience(logprobs, values, kl, advantages, returns)


def estimate_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate whitened advantages, and returns, by GAE (Schulman et al. 2016, arXiv 1506.02438): `[B, R]` each."""
    # delta_t = r_t + gamma * V_{t+1} - V_t, where V is 0 after the last token
    deltas = rewards + GAMMA * pad(values[:, 1:], (0, 1)) - values
    # A_t = delta_t + gamma * lambda * A_{t+1}
    advantages = deltas.clone()
    for t in reversed(range(deltas.shape[1] - 1)):
        advantages[:, t] += GAMMA * GAE_LAMBDA * advantages[:, t + 1]
    returns = advantages + values
    # whitened: mean 0 and variance 1 over all tokens of the step
    mean, var = advantages[mask].mean(), advantages[mask].var()
    return (advantages - mean) / (var + 1e-8).sqrt() * mask, returns


def update(
    policy: ActorCritic, optimizer: torch.optim.Optimizer, responses: Responses, experience: Experience
) -> Tensor:
    """Improve the policy and its values on one step's responses; return the mean policy loss and value loss: `[2]`."""
    losses = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(responses.tokens)).split(MINIBATCH_SIZE):
            minibatch = Responses(*(tensor[rows] for tensor in responses))
            old = Experience(*(tensor[rows] for tensor in experience))
            logprobs, values = policy(*minibatch)
            num_tokens = minibatch.mask.sum()  # the losses are means over the tokens of the mini-batch

            # clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7): no gain from leaving the clip range
            ratio = (logprobs - old.logprobs).exp()  # [B, R], pi(token) / pi_old(token)
            unclipped = -old.advantages * ratio
            clipped = -old.advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
            policy_loss = (torch.maximum(unclipped, clipped) * minibatch.mask).sum() / num_tokens

            # clipped value loss: of the value and the value held near the old one, the larger error counts
            held = values.clamp(old.values - VALUE_CLIP_RANGE, old.values + VALUE_CLIP_RANGE)
            errors = torch.maximum((values - old.returns) ** 2, (held - old.returns) ** 2)
            value_loss = 0.5 * (errors * minibatch.mask).sum() / num_tokens

            optimizer.zero_grad()
            (policy_loss + VALUE_COEF * value_loss).backward()
            optimizer.step()
            losses.append(torch.stack([policy_loss, value_loss]).detach())
    return torch.stack(losses).mean(0)


def adapt(kl_coef: float, kl: float, num_sequences: int) -> float:
    """Move the KL penalty's weight so that the KL, in nats per sequence, nears its target (Ziegler et al. 2019)."""
    error = min(max(kl / KL_TARGET - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_sequences / KL_HORIZON)


def main(num_steps: int = NUM_STEPS) -> None:
    """Train, and print a line per step: its figures, its first prompt and the response to it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model gains nothing from more
    config = LlamaConfig(
        vocab_size=11, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    policy = ActorCritic(LlamaForCausalLM(config))
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    kl_coef = KL_COEF
    print("step  score     kl  kl_coef  policy loss  value loss  prompt > response")
    for step in range(num_steps):
        prompts = [torch.randint(10, (length,)) for length in torch.randint(1, 5, (BATCH_SIZE,))]
        responses = sample(policy, prompts)
        scores = score(responses)
        experience = make_experience(policy, reference, responses, scores, kl_coef)
        policy_loss, value_loss = update(policy, optimizer, responses, experience)
        kl = experience.kl.sum().item() / BATCH_SIZE  # nats per sequence

        figures = f"{step:4} {scores.mean():6.2f} {kl:6.2f} {kl_coef:8.4f} {policy_loss:12.4f} {value_loss:11.4f}"
        text, start = "".join("0123456789 "[token] for token in responses.tokens[0]), len(prompts[0])
        print(f"{figures}  {text[:start]:>6} > {text[start:]}")
        kl_coef = adapt(kl_coef, kl, BATCH_SIZE)


if __name__ == "__main__":
    main()
