"""The options of the update; TRL 0.11's name of an option follows "TRL:". `docs/trl.md` compares them."""

from typing import Literal

from pydantic import Field

from ppo_ray.config.sections import Section


class UpdateConfig(Section):
    """The update."""

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
    loss_aggregation: Literal["token_mean", "sequence_mean", "microbatch_mean"] = "token_mean"
    """Weight of a token's loss in a mini-batch: all tokens alike, all sequences alike, or all parts alike (TRL's way
    under gradient accumulation, where a token counts less among longer neighbours)."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token. TRL: `gamma`."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation: 0 trusts the values, 1 the rewards. TRL: `lam`."""
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
    """Scaling of advantages to mean 0 and variance 1 over a step's tokens. TRL does so always."""
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
