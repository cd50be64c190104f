"""The options of the update; TRL 0.11's name of an option follows "TRL:". `docs/trl.md` compares them."""

from typing import Literal

from pydantic import Field

from ppo_ray.config.sections import Section


class UpdateConfig(Section):
    """The update."""

    learning_rate: float = Field(default=1.41e-5, gt=0)
    """Of Adam. TRL: `learning_rate`."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the warm-up's end to the run's last step. TRL: `lr_scheduler`."""
    learning_rate_final_factor: float = Field(default=0.0, ge=0, le=1)
    """What a linear or cosine schedule falls to, as a part of learning_rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Of the value head, or of the separate critic; null: learning_rate."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which the value head (or critic) alone learns, and the policy stays as it is."""
    epochs: int = Field(default=4, ge=1)
    """Passes over a step's trajectories. TRL: `ppo_epochs`."""
    minibatch_size: int | None = Field(default=None, ge=1)
    """Trajectories an optimizer step; must divide rollout.batch_size; null: all of them. TRL: `mini_batch_size` times
    `gradient_accumulation_steps`."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Equal parts of a mini-batch. Changes nothing but with loss_aggregation=microbatch_mean: memory is bounded by
    learner.microbatch_tokens. TRL: `gradient_accumulation_steps`."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "microbatch_mean"] = "token_mean"
    """What a token's loss weighs in a mini-batch: all tokens alike, all sequences alike, or all parts alike (TRL's way
    under gradient accumulation, where a token counts less among longer neighbours)."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token. TRL: `gamma`."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Of generalised advantage estimation: 0 trusts the values, 1 the rewards. TRL: `lam`."""
    clip_range: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may leave 1 before its gradient is cut. TRL: `cliprange`."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """How far upwards, if that is to be another limit (DAPO's clip-higher); null: clip_range."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Largest ratio that counts where the advantage is negative (dual-clip PPO; 3 is usual); null: no limit."""
    log_ratio_clamp: float | None = Field(default=None, gt=0)
    """Holds log-ratios within plus and minus this before they become ratios (20 is usual); null: as they are."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh each token's policy loss by min(p_learner / p_engine, this): truncated importance sampling against engines
    that compute other probabilities than the learner (2 is usual); null: not weighed."""
    value_clip_range: float | None = Field(default=0.2, gt=0)
    """How far a value may leave the old one before its gradient is cut, in the score's unit; null: no limit. TRL:
    `cliprange_value`."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss. TRL: `vf_coef`."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the bonus for the entropy of the policy's distributions, nats a token."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Of the KL to the reference: log-ratio d of the sampled token, d^2 / 2, exp(-d) - 1 + d, |d|, or the divergence
    itself over the whole vocabulary. TRL: `kl_penalty`, where k1 is "kl" and k2 "mse"."""
    kl_clamp: float | None = Field(default=None, gt=0)
    """Holds each token's estimate of the KL within plus and minus this; 10 is usual. It is for k3 above all, where one
    token can outweigh all others. null: as it is."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether kl_coef times the KL is taken off each token's reward, or added to the loss (k2, k3 or abs).
    In the loss, k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy)."""
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    """Whether kl_coef follows the measured KL towards kl_target, or stays. TRL: `adap_kl_ctrl`."""
    kl_coef: float = Field(default=0.2, ge=0)
    """Weight of the KL penalty (the first one, if adaptive). TRL: `init_kl_coef`."""
    kl_target: float = Field(default=6.0, gt=0)
    """KL to the reference that the adaptive controller aims at, in nats summed over a sequence. TRL: `target`."""
    kl_horizon: float = Field(default=10000.0, gt=0)
    """Trajectories over which the adaptive controller corrects itself. TRL: `horizon`."""
    score_scaling: Literal["none", "std", "mean_std"] = "none"
    """Divide scores by the running standard deviation of all scores so far; mean_std: subtract their mean before. TRL:
    `use_score_scaling`, and with it `use_score_norm`."""
    score_clip: float | None = Field(default=None, gt=0)
    """Hold scores, after scaling, within plus and minus this; null: as they are. TRL: `score_clip`."""
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    """Taken off the score, after scaling and clipping, of a response that did not end by itself; null: nothing."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Hold each token's reward, KL penalty and score together, within plus and minus this; null: as they are."""
    whiten_rewards: Literal["off", "tokens", "padded"] = "off"
    """Whether rewards get variance 1, their mean kept. tokens: those of response tokens; padded: padding is given the
    whitened zero too, as in TRL, and GAE carries it into the shorter responses. TRL: `whiten_rewards`."""
    whiten_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over a step's tokens. TRL does so always."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longest gradient of an optimizer step, global L2 norm; null: not clipped. TRL: `max_grad_norm`."""
    ratio_threshold: float = Field(default=10.0, gt=0)
    """Largest mean probability ratio of a mini-batch that is learned from. TRL: `ratio_threshold`."""
    ratio_exceeded: Literal["skip", "zero_loss"] = "skip"
    """What happens beyond it: no optimizer step; or, as in TRL, a step with the loss of that part multiplied by zero,
    in which Adam's momentum still moves the weights."""
    early_stopping: Literal["off", "before_step", "after_epoch"] = "off"
    """Whether the step ends early when the policy has moved by more than 1.5 x early_stopping_kl: before an optimizer
    step that starts from beyond it; or, as in TRL, after an epoch whose last part was beyond it. TRL:
    `early_stopping`."""
    early_stopping_kl: float = Field(default=1.0, gt=0)
    """KL of the policy before the update to the policy now, nats a token, that early stopping allows 1.5 times. TRL:
    `target_kl`."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run, the trajectories that made it written out; or skip the
    mini-batch and count it."""
