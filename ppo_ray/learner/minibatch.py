"""One optimizer step: the gradients of a mini-batch, the checks that may forbid the step, and the step itself.

Dimensions: B sequences of the batch, R response tokens.
"""

from dataclasses import replace

import numpy as np
import torch

from ppo_ray.algo.losses import loss_scale, token_weights
from ppo_ray.config import UpdateConfig
from ppo_ray.learner.batch import Layout, Order, ResponseBatch, split_groups
from ppo_ray.learner.experience import Experience, Forward
from ppo_ray.learner.fsdp import gather_full
from ppo_ray.learner.objective import Objective, objective
from ppo_ray.learner.ranks import detect_lost_peers
from ppo_ray.learner.reports import MinibatchReport
from ppo_ray.learner.sharding import Sharding
from ppo_ray.learner.surrogate import make_surrogate
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseOutput

_EARLY_STOPPING_FACTOR = 1.5  # TRL 0.11: "stop early if we exceed this value by over 50%"


class NonFiniteMinibatch(Exception):
    """A mini-batch's loss or gradient is not finite, and such are not skipped."""

    def __init__(self, message: str, rows: np.ndarray) -> None:
        """Keep which rows of the table made it, `[b]` int64."""
        super().__init__(message)
        self.rows = rows


class MinibatchUpdater:
    """Makes the optimizer steps of an update, one per mini-batch."""

    def __init__(
        self,
        policy: ActorCritic,
        sharding: Sharding,
        optimizer: torch.optim.Optimizer,
        ppo: UpdateConfig,
        layout: Layout,
    ) -> None:
        """Train `policy` with `optimizer`, which steps what `sharding.optimized_parameters` returns for it.

        Raises:
            InputError: the policy's loss cannot be imported; see `make_surrogate`.
        """
        self._policy, self._sharding, self._optimizer = policy, sharding, optimizer
        self._ppo, self._layout, self._surrogate = ppo, layout, make_surrogate(ppo)

    def first_pass_is_whole(self, batch: ResponseBatch) -> bool:
        """Say whether the first mini-batch is the whole batch in one pass, which `run_models` has then made.

        Of several passes none is kept: `microbatch_tokens` is what there is memory for.
        """
        whole_batch = (self._ppo.minibatch_size or batch.num_sequences) >= batch.num_sequences
        return whole_batch and self._ppo.gradient_accumulation == 1 and self._layout.num_passes(batch) == 1

    def run_epochs(
        self,
        batch: ResponseBatch,
        experience: Experience,
        draw: Order,
        kl_coef: float,
        values_only: bool = False,
        forward: Forward | None = None,
    ) -> tuple[list[MinibatchReport], bool]:
        """Make the steps of all epochs; returns their reports, and whether early stopping ended them.

        Args:
            batch: all trajectories of the step.
            experience: of the whole batch.
            draw: the order of each epoch; where responses are compared, groups stay whole in it.
            kl_coef: as in `update`.
            values_only: as in `update`.
            forward: of the first mini-batch, as in `update`.

        Raises:
            NonFiniteMinibatch: a loss or gradient is not finite; the weights are as before that mini-batch.
            PeersLost: another rank is gone.
        """
        reports: list[MinibatchReport] = []
        groups = batch.groups if self._ppo.compares_groups else np.arange(batch.num_sequences)
        for epoch in range(self._ppo.epochs):
            for sequences in split_groups(draw(epoch), groups, self._ppo.minibatch_size or batch.num_sequences):
                with detect_lost_peers(self._layout.ranks.rank):
                    report = self.update(batch, experience, sequences, kl_coef, values_only, forward)
                forward = None  # the policy has changed
                if report.outcome == "nonfinite" and self._ppo.on_nonfinite == "stop":
                    raise NonFiniteMinibatch(
                        f"epoch {epoch} the loss is {report.metrics['loss/total']}, the norm of its gradient "
                        f"{report.grad_norm}. Lower ppo.learning_rate={self._ppo.learning_rate}, set "
                        "ppo.max_grad_norm, look at the scores; or count such mini-batches: ppo.on_nonfinite=skip",
                        batch.kept[sequences],
                    )
                reports.append(report)
                if report.outcome == "early_stopped":
                    return reports, True
            if self._early_stop_after(reports[-1]):
                return reports, True
        return reports, False

    def update(
        self,
        batch: ResponseBatch,
        experience: Experience,
        sequences: np.ndarray,
        kl_coef: float,
        values_only: bool = False,
        forward: Forward | None = None,
    ) -> MinibatchReport:
        """Add up the gradients of all micro-batches and make one optimizer step, unless something forbids it.

        A step is forbidden when all gradients are known; they are dropped then. (TRL multiplies the loss by zero where
        the ratio is too large and steps all the same, so that Adam's momentum still moves the weights. It also stops
        early only after the step that went too far.)

        Args:
            batch: all trajectories of the step.
            experience: of the whole batch.
            sequences: `[b]` int64, the rows of the batch that make the mini-batch, in its order.
            kl_coef: weight of the KL in the loss with `ppo.kl_in=loss`.
            values_only: whether only the value head (or critic) learns.
            forward: the mini-batch's forward pass by the current policy, if it was made before.
        """
        report = self._accumulate(batch, experience, sequences, kl_coef, values_only, forward)
        report = self._judge(report, values_only)
        if report.outcome == "stepped":
            if self._ppo.max_grad_norm is not None:
                self._clip(report.grad_norm, self._ppo.max_grad_norm, values_only)
            self._optimizer.step()
            self._sharding.after_step()
        self._optimizer.zero_grad()
        return report

    def _early_stop_after(self, report: MinibatchReport) -> bool:
        """Say whether the update ends after an epoch whose last mini-batch was this one, as in TRL."""
        return self._ppo.early_stopping == "after_epoch" and report.last_part_kl > self._early_stopping_limit

    @property
    def _early_stopping_limit(self) -> float:
        return _EARLY_STOPPING_FACTOR * self._ppo.early_stopping_kl

    def _judge(self, report: MinibatchReport, values_only: bool) -> MinibatchReport:
        """Return the report with the gradient's norm and the outcome."""
        ppo, metrics = self._ppo, report.metrics
        if ppo.early_stopping == "before_step" and metrics["policy/kl"] > self._early_stopping_limit:
            return replace(report, outcome="early_stopped")
        if ppo.ratio_exceeded == "skip" and metrics["policy/ratio_mean"] > ppo.ratio_threshold:
            return replace(report, outcome="ratio_exceeded")
        gradients = [parameter.grad for parameter in self._parameters(values_only) if parameter.grad is not None]
        report = replace(report, grad_norm=float(gather_full(torch.nn.utils.get_total_norm(gradients))))
        finite = np.isfinite([report.metrics["loss/total"], report.grad_norm]).all()
        return report if finite else replace(report, outcome="nonfinite")

    def _clip(self, norm: float, max_norm: float, values_only: bool) -> None:
        """Scale the gradients down to a norm; torch's own function wants the norm where the gradients are."""
        factor = min(1.0, max_norm / (norm + 1e-6))
        for parameter in self._parameters(values_only):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _accumulate(
        self,
        batch: ResponseBatch,
        experience: Experience,
        sequences: np.ndarray,
        kl_coef: float,
        values_only: bool,
        forward: Forward | None,
    ) -> MinibatchReport:
        """Run all micro-batches forwards and backwards; their gradients add up in the parameters."""
        ppo, num_tokens = self._ppo, batch.num_response_tokens
        num_parts = min(ppo.gradient_accumulation, len(sequences))
        weights = torch.zeros(batch.num_sequences, dtype=torch.float64)
        weights[sequences] = token_weights(num_tokens[sequences], ppo.loss_aggregation, num_parts)
        scale = loss_scale(num_tokens[sequences], ppo.loss_aggregation, ppo.loss_length)
        sums, zeroes_parts = _Sums(self._layout), ppo.ratio_exceeded == "zero_loss"
        for number, part in enumerate(np.array_split(sequences, num_parts), 1):
            sums.start_part(float(weights[part] @ torch.from_numpy(num_tokens[part]).double()))
            before = self._gradients(values_only) if zeroes_parts else []
            passes = [forward.rows] if forward else list(self._layout.passes(batch, part))
            for rows in passes:
                index = torch.from_numpy(rows.sequences)
                device, dtype = rows.response_mask.device, experience.old_logprobs.dtype
                row_weights = weights[index].to(device, dtype, non_blocking=True)
                place = index.to(device, non_blocking=True), slice(rows.response_mask.shape[1])
                if values_only:
                    output = self._forward_values(rows, experience.old_logprobs[place])
                else:
                    output = forward.output if forward else self._policy(rows)
                options = (ppo, kl_coef, self._surrogate)
                micro = objective(output, experience, place, rows.response_mask, row_weights, *options)
                is_last = rows is passes[-1] and (number == num_parts or zeroes_parts)
                self._sharding.before_backward(completes=is_last)
                (micro.loss if scale == 1 else micro.loss * scale).backward()
                sums.add(micro, rows)
            sums.end_part()
            if zeroes_parts and sums.part_mean("policy/ratio_mean") > ppo.ratio_threshold:
                sums.zero_losses()
                self._zero_part(before, values_only)
        self._sharding.sum_gradients(self._parameters(values_only))
        return sums.report()

    def _gradients(self, values_only: bool) -> list[torch.Tensor | None]:
        gradients = [parameter.grad for parameter in self._parameters(values_only)]
        return [None if gradient is None else gradient.clone() for gradient in gradients]

    def _zero_part(self, before: list[torch.Tensor | None], values_only: bool) -> None:
        """Replace a part's gradient by zero times it, as for a loss multiplied by zero: zeros, or NaN."""
        for parameter, gradient in zip(self._parameters(values_only), before, strict=True):
            if parameter.grad is not None and gradient is None:
                parameter.grad.mul_(0)
            elif parameter.grad is not None and gradient is not None:
                parameter.grad.sub_(gradient).mul_(0).add_(gradient)

    def _forward_values(self, rows: PackedRows, old_logprobs: torch.Tensor) -> ResponseOutput:
        """Return the policy's output with a gradient for its values only; its log-probabilities are the old ones."""
        values = self._policy.forward_values(rows)
        return ResponseOutput(old_logprobs, torch.zeros_like(old_logprobs), values.new_empty(0), values)

    def _parameters(self, values_only: bool) -> list[torch.nn.Parameter]:
        parameters = self._policy.value_parameters() if values_only else self._policy.parameters()
        return self._sharding.optimized_parameters(parameters)


class _Sums:
    """The metrics of a mini-batch's micro-batches, added up on the device until `report`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._names: tuple[str, ...] = ()
        self._parts: list[torch.Tensor] = []
        self._shares: list[float] = []
        self._ratios: list[torch.Tensor] = []

    def start_part(self, share: float) -> None:
        """Begin the next part; `share` is the weight of its tokens together."""
        self._parts.append(torch.zeros((), dtype=torch.float64, device=self._layout.device))
        self._shares.append(share)

    def add(self, micro: Objective, rows: PackedRows) -> None:
        """Add a micro-batch, without waiting for the device."""
        self._names = tuple(micro.metrics)
        self._parts[-1] = self._parts[-1] + torch.stack(list(micro.metrics.values())).double()
        self._ratios.append(micro.ratios.flatten()[rows.places])

    def end_part(self) -> None:
        """Sum the part's metrics over all ranks."""
        self._layout.ranks.sum([self._parts[-1]])

    def part_mean(self, name: str) -> float:
        """Return a metric of the last part alone."""
        return float(self._parts[-1][self._names.index(name)]) / self._shares[-1]

    def zero_losses(self) -> None:
        """Multiply the last part's losses by zero."""
        for name in {"loss/policy", "loss/value", "loss/total"}.intersection(self._names):
            self._parts[-1][self._names.index(name)] *= 0

    def report(self) -> MinibatchReport:
        """Put the parts together; the gradient's norm and the outcome are filled in later."""
        parts = torch.stack(self._parts)
        ratios = torch.cat([*self._ratios, parts.new_empty(0, dtype=torch.float32)])
        extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=parts.device)
        if len(ratios):
            extremes = torch.stack([ratios.max(), -ratios.min()]).double()
        self._layout.ranks.max([extremes])
        return MinibatchReport(
            metrics=dict(zip(self._names, parts.sum(0).tolist(), strict=True)),
            ratio_max=float(extremes[0]),
            ratio_min=-float(extremes[1]),
            ratios=ratios.float().cpu().numpy(),
            last_part_kl=self.part_mean("policy/kl"),
        )
