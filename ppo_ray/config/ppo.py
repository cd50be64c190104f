"""The options of the update; TRL 0.11's name of an option follows "TRL:". `docs/trl.md` compares them."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from ppo_ray.config.file import Contradiction
from ppo_ray.config.rollout import RolloutConfig
from ppo_ray.config.sections import ModelConfig, Section

Estimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline"]
PolicyLossName = Literal["clip", "gspo", "cispo"]


class UpdateConfig(Section):
    """The update."""

    advantages: Estimator = "gae"
    """Estimator of advantages. gae: generalised advantage estimation, with values. The others have no value function:
    grpo, dr_grpo, rloo and reinforce_baseline compare the responses to a prompt (rollout.responses_per_prompt);
    reinforce sums the rewards to come, REINFORCE++. docs/algorithms.md compares them."""
    policy_loss: str = Field(default="clip", pattern=r"^(clip|gspo|cispo|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$")
    """Loss of the policy: PPO's clipped surrogate (clip), GSPO's with one ratio per sequence (gspo), CISPO's with a
    capped weight (cispo), or your own function, as "package.module:function", which returns a loss per token.
    docs/algorithms.md has its arguments."""
    learning_rate: float = Field(default=1.41e-5, gt=0)
    """Adam's learning rate for the policy. TRL: `learning_rate`."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate from the warm-up's end to the run's last step. TRL: `lr_scheduler`."""
    learning_rate_final_factor: float = Field(default=0.0, ge=0, le=1)
    """Factor of learning_rate that a linear or cosine schedule falls to."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Adam's learning rate for the value head, or for the separate critic; null: learning_rate."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which the value head (or critic) alone learns, and the policy stays as it is."""
    epochs: int = Field(default=4, ge=1)
    """Passes over a step's trajectories. TRL: `ppo_epochs`."""
    minibatch_size: int | None = Field(default=None, ge=1)
    """Trajectories per optimizer step. It must divide rollout.batch_size. null: all of them. TRL: `mini_batch_size`
    times `gradient_accumulation_steps`."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Number of equal parts of a mini-batch, for loss_aggregation=microbatch_mean alone; otherwise it changes nothing,
    because learner.microbatch_tokens bounds the memory. TRL: `gradient_accumulation_steps`."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "microbatch_mean"] = "token_mean"
    """Weight of a token's loss in a mini-batch: all tokens alike, all sequences alike, each sequence's sum divided by
    loss_length (sequence_sum, Dr.GRPO's), or all parts alike (TRL's way under gradient accumulation, where a token
    counts less among longer neighbours)."""
    loss_length: int | None = Field(default=None, ge=1)
    """Tokens that loss_aggregation=sequence_sum divides a sequence's sum by, the same for all;
    rollout.max_response_tokens is usual. null: for the other aggregations."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token. TRL: `gamma`."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation: 0 trusts the values, 1 the rewards. TRL: `lam`."""
    gae_lambda_value: float | None = Field(default=None, ge=0, le=1)
    """Lambda of the returns that values learn, if that is to be another one (VAPO: 1); null: the advantages'."""
    gae_length_alpha: float | None = Field(default=None, gt=0)
    """Alpha of a lambda for each response's length R, instead of gae_lambda: 1 - 1 / max(alpha R, 1) (VAPO: 0.05);
    null: gae_lambda for all."""
    clip_range: float = Field(default=0.2, gt=0)
    """Distance that a token's probability ratio may have from 1 before its gradient is cut. TRL: `cliprange`."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """The same distance upwards, if that is to be another limit (DAPO's clip-higher); null: clip_range."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Largest ratio that counts where the advantage is negative (dual-clip PPO; 3 is usual); null: no limit."""
    log_ratio_clamp: float | None = Field(default=None, gt=0)
    """Bound of log-ratios, plus and minus, before they become ratios (20 is usual); null: no bound."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Cap of importance weights: each token's policy loss is weighed by min(p_learner / p_engine, cap), truncated
    importance sampling against engines that compute other probabilities than the learner (2 is usual). null: no
    weights."""
    value_clip_range: float | None = Field(default=0.2, gt=0)
    """Distance that a value may have from the old one before its gradient is cut, in the score's unit; null: no limit.
    TRL: `cliprange_value`."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss. TRL: `vf_coef`."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the bonus for the entropy of the policy's distributions, nats per token."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Estimator of the KL to the reference: log-ratio d of the sampled token, d^2 / 2, exp(-d) - 1 + d, |d|, or the
    divergence itself over the whole vocabulary. TRL: `kl_penalty`, where k1 is "kl" and k2 "mse"."""
    kl_clamp: float | None = Field(default=None, gt=0)
    """Bound of each token's estimate of the KL, plus and minus; 10 is usual. It is for k3 above all, where one token
    can outweigh all others. null: no bound."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the KL penalty: kl_coef times the KL is taken off each token's reward, or added to the loss (k2, k3 or
    abs). In the loss, k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy)."""
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    """Course of kl_coef: it follows the measured KL towards kl_target (adaptive), or stays (fixed). TRL:
    `adap_kl_ctrl`."""
    kl_coef: float = Field(default=0.2, ge=0)
    """Weight of the KL penalty (the first one, if adaptive). TRL: `init_kl_coef`."""
    kl_target: float = Field(default=6.0, gt=0)
    """KL to the reference that the adaptive controller aims at, in nats summed over a sequence. TRL: `target`."""
    kl_horizon: float = Field(default=10000.0, gt=0)
    """Number of trajectories over which the adaptive controller corrects itself. TRL: `horizon`."""
    score_scaling: Literal["none", "std", "mean_std"] = "none"
    """Scaling of scores. std: divided by the running standard deviation of all scores so far; mean_std: their mean is
    subtracted before. TRL: `use_score_scaling`, and with it `use_score_norm`."""
    score_clip: float | None = Field(default=None, gt=0)
    """Bound of scores after scaling, plus and minus; null: no bound. TRL: `score_clip`."""
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    """Penalty of a response that did not end by itself, taken off its score after scaling and clipping; null: none."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Bound of each token's reward, KL penalty and score together, plus and minus; null: no bound."""
    whiten_rewards: Literal["off", "tokens", "padded"] = "off"
    """Scaling of rewards to variance 1, their mean kept. tokens: over response tokens. padded: as in TRL, where padding
    gets the whitened zero too, and GAE carries it into the shorter responses. TRL: `whiten_rewards`."""
    whiten_advantages: bool = True
    """Scaling of advantages to mean 0 and variance 1 over a step's tokens, with gae, reinforce and reinforce_baseline;
    grpo, dr_grpo and rloo are as their group makes them. TRL does so always."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longest gradient of an optimizer step, global L2 norm; null: not clipped. TRL: `max_grad_norm`."""
    ratio_threshold: float = Field(default=10.0, gt=0)
    """Largest mean probability ratio of a mini-batch that is learned from. TRL: `ratio_threshold`."""
    ratio_exceeded: Literal["skip", "zero_loss"] = "skip"
    """Consequence of a mini-batch beyond ratio_threshold. skip: no optimizer step. zero_loss: as in TRL, a step with
    the loss of that part multiplied by zero, in which Adam's momentum still moves the weights."""
    early_stopping: Literal["off", "before_step", "after_epoch"] = "off"
    """Early end of an update whose policy has moved by more than 1.5 x early_stopping_kl. before_step: before an
    optimizer step that starts from beyond it. after_epoch: as in TRL, after an epoch whose last part was beyond it.
    TRL: `early_stopping`."""
    early_stopping_kl: float = Field(default=1.0, gt=0)
    """KL of the policy before the update to the policy now, nats per token, that early stopping allows 1.5 times. TRL:
    `target_kl`."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Consequence of a NaN or infinite loss or gradient. stop: the run ends, and the trajectories that made it are
    written out. skip: the mini-batch is skipped and counted."""

    of_values: ClassVar[tuple[str, ...]] = (
        *("gae_lambda", "gae_lambda_value", "gae_length_alpha", "whiten_rewards"),
        *("value_learning_rate", "value_warmup_steps", "value_clip_range", "value_coef"),
    )
    """The options that are for a value function."""

    @property
    def has_values(self) -> bool:
        """Whether there is a value function."""
        return self.advantages == "gae"

    @property
    def compares_groups(self) -> bool:
        """Whether a response's advantage depends on the other responses to its prompt."""
        return self.advantages in ("grpo", "dr_grpo", "rloo", "reinforce_baseline")

    @property
    def own_policy_loss(self) -> bool:
        """Whether the policy's loss is a function of the user's own."""
        return ":" in self.policy_loss


def algorithm_contradictions(ppo: UpdateConfig, rollout: RolloutConfig, model: ModelConfig) -> Iterator[Contradiction]:
    """Yield what does not go with the estimator of advantages and the policy's loss."""
    size = rollout.responses_per_prompt
    if ppo.compares_groups and size < 2:
        yield Contradiction(
            ("ppo.advantages", "rollout.responses_per_prompt"),
            f"{ppo.advantages} compares the responses to a prompt, and there is one: set "
            "rollout.responses_per_prompt to 2 or more (8 is usual)",
        )
    elif ppo.compares_groups and ppo.minibatch_size is not None and ppo.minibatch_size % size:
        yield Contradiction(
            ("ppo.minibatch_size", "rollout.responses_per_prompt"),
            f"{ppo.minibatch_size} is no multiple of rollout.responses_per_prompt={size}: ppo.advantages="
            f"{ppo.advantages} keeps groups whole in mini-batches",
        )
    if ppo.compares_groups and ppo.gamma != 1:
        yield Contradiction(
            ("ppo.gamma", "ppo.advantages"), f"{ppo.advantages} gives all tokens of a response one advantage: set 1"
        )
    if not ppo.has_values:
        of_model = ("critic", "critic_path", "critic_revision", "value_head_init")
        sections: tuple[tuple[str, Section, tuple[str, ...]], ...] = (
            ("ppo", ppo, ppo.of_values),
            ("model", model, of_model),
        )
        for section, options, name in ((key, part, name) for key, part, names in sections for name in names):
            if (value := getattr(options, name)) != type(options).model_fields[name].default:
                yield Contradiction(
                    (f"{section}.{name}", "ppo.advantages"),
                    f"{value} is for a value function, and ppo.advantages={ppo.advantages} has none: leave it out, or "
                    "set ppo.advantages=gae",
                )
    if ppo.whiten_rewards == "padded" and (ppo.gae_length_alpha or ppo.gae_lambda_value is not None):
        yield Contradiction(
            ("ppo.whiten_rewards", "ppo.gae_lambda_value", "ppo.gae_length_alpha"),
            "padded is TRL's, with one lambda for all: set off or tokens",
        )
    if (ppo.loss_aggregation == "sequence_sum") != (ppo.loss_length is not None):
        yield Contradiction(
            ("ppo.loss_length", "ppo.loss_aggregation"),
            f"sequence_sum divides by it, and no other aggregation does: set both or neither; "
            f"rollout.max_response_tokens={rollout.max_response_tokens} is usual",
        )
    yield from _loss_contradictions(ppo)


def _loss_contradictions(ppo: UpdateConfig) -> Iterator[Contradiction]:
    """Yield the options that the policy's loss has no use for."""
    unused = {
        "gspo": {"dual_clip": "it bounds single tokens", "importance_cap": "its weights are of single tokens"},
        "cispo": {"dual_clip": "its weights are capped whatever the advantage"},
    }.get(ppo.policy_loss, {})
    if ppo.own_policy_loss:
        unused = dict.fromkeys(("clip_range", "clip_range_high", "dual_clip", "log_ratio_clamp"), "it is your own")
    for name, why in unused.items():
        if (value := getattr(ppo, name)) != type(ppo).model_fields[name].default:
            yield Contradiction(
                (f"ppo.{name}", "ppo.policy_loss"),
                f"{value} has no effect on ppo.policy_loss={ppo.policy_loss}: {why}; leave it out",
            )
