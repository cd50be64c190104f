"""PPOLearner: policy, values, frozen reference, optimizer and KL controller; one PPO update at a time.

Dimensions: B sequences. The reference is TRL 0.11's `PPOTrainer.step` (`tests/golden`). Where that errs, the default is
correct, and an option gives TRL's own form (`docs/trl.md`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.algo.kl import AdaptiveKLController, FixedKLController, KLController
from ppo_ray.algo.rewards import RunningMoments
from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.errors import CheckpointError, InputError, NonFiniteError
from ppo_ray.learner.batch import Layout, Order, ResponseBatch, draw_order
from ppo_ray.learner.experience import Forward, ModelOutputs, estimate, run_models, summarize_experience
from ppo_ray.learner.fsdp import gather_full
from ppo_ray.learner.loading import load_models
from ppo_ray.learner.metrics import summarize_table
from ppo_ray.learner.minibatch import MinibatchUpdater, NonFiniteMinibatch
from ppo_ray.learner.objective import summarize_minibatches
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.optimizer import load_optimizer_state, make_adam, optimizer_file, set_learning_rates
from ppo_ray.learner.probe import WeightProbe
from ppo_ray.learner.ranks import Ranks, detect_lost_peers
from ppo_ray.learner.reports import Stopwatch, UpdateReport
from ppo_ray.learner.sharding import Replicated, Sharding
from ppo_ray.learner.snapshot import LearnerSnapshot, StateChecksums
from ppo_ray.learner.state import LearnerState, make_plain_files
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.fusion import measure_compilation
from ppo_ray.models.loading import default_device
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.seeding import derive_seed
from ppo_ray.weights.manifest import num_buckets
from ppo_ray.weights.snapshot import Buffers, WeightSnapshot, Wire


class PPOLearner:
    """Trains a policy; knows no Ray. Not thread-safe: one call at a time."""

    def __init__(
        self,
        policy: ActorCritic,
        reference: ResponseLM,
        ppo: UpdateConfig,
        *,
        microbatch_tokens: int = 1024,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
        num_steps: int = 1,
        sharding: Sharding | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Take models that are loaded, in eval mode, on one device; `load` loads them.

        Args:
            policy: with what estimates its values, if `ppo.advantages` has values.
            reference: frozen, of the same vocabulary, at the same temperature.
            ppo: the algorithm.
            microbatch_tokens: prompt and response tokens, padding included, per forward pass.
            optimizer: of the policy's parameters, its learning rate the caller's; None: Adam as `ppo` says.
            seed: of the run; addresses the order of mini-batches.
            num_steps: of the run; the learning rate's schedule ends with them.
            sharding: how the policy lies on the ranks that share the update; None: whole, on this process alone.
            offload: what lies in host memory between its phases; None: nothing.
        """
        self.policy_version = 0
        """Number of updates that the weights have seen."""
        if ppo.has_values != (policy.value_head is not None):
            raise InputError(f"ppo.advantages={ppo.advantages} is for another policy: {type(policy).__name__}")
        self._policy, self._reference, self._ppo = policy, reference, ppo
        self._seed, self._num_steps, self._moments = seed, num_steps, RunningMoments()
        self._sharding = sharding = sharding or Replicated(policy, Ranks())
        self._layout = Layout.of(policy, reference, microbatch_tokens, sharding.ranks, sharding.in_lockstep)
        self._owns_optimizer, self._offload = optimizer is None, offload or Offload()
        self._optimizer = optimizer or make_adam(policy, sharding, ppo, self._offload)
        self._updater = MinibatchUpdater(policy, sharding, self._optimizer, ppo, self._layout)
        self.controller: KLController = FixedKLController(ppo.kl_coef)
        """Of the KL penalty's weight; may be replaced between updates."""
        if ppo.kl_controller == "adaptive":
            self.controller = AdaptiveKLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
        self._tokenizer, self._unfinished = cast("Any", None), False
        self._checksums = StateChecksums(policy, reference, sharding, self._offload)

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        ppo: UpdateConfig,
        learner: LearnerConfig,
        *,
        temperature: float,
        seed: int = 0,
        num_steps: int = 1,
        device: str | None = None,
        ranks: Ranks | None = None,
        checkpoint: Path | None = None,
    ) -> Self:
        """Load policy, values and reference and make the optimizer.

        Args:
            model: a value head or critic that lies beside the policy is loaded, else it starts from the seed; neither,
                where `ppo.advantages` has no values.
            ppo: the algorithm.
            learner: its micro-batches, and how the models lie on the ranks.
            temperature: that responses are sampled at.
            seed: of the run.
            num_steps: of the run.
            device: None takes the GPU if there is one.
            ranks: the processes that share the update; None: this one alone.
            checkpoint: what `save` wrote, to go on from; None: begin with the models of `model`.

        Raises:
            InputError: a model cannot be loaded or is not supported, or the reference is not that of the checkpoint.
            CheckpointError: the checkpoint does not give back the weights that went into it.
        """
        place = torch.device(device) if device is not None else default_device()
        at = (temperature, derive_seed(seed, "value_head"), place, ranks or Ranks())
        models = load_models(model, learner, *at, checkpoint, ppo.has_values)
        options: Any = {"microbatch_tokens": learner.microbatch_tokens, "seed": seed, "num_steps": num_steps}
        options |= {"sharding": models.sharding, "offload": models.offload}
        loaded = cls(models.policy, models.reference, ppo, **options)
        loaded._tokenizer = models.tokenizer
        if checkpoint is not None:
            loaded._restore(checkpoint, model)
        return loaded

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty in the next update."""
        return self.controller.kl_coef

    def update(
        self, trajectories: pa.Table, step: int, order: Order | None = None, *, drop_flat: bool = False
    ) -> UpdateReport:
        """Make one PPO update on all scored trajectories of a step; returns metrics and the learned columns.

        Trajectories without a score are counted and left out. With fewer than two response tokens left nothing is
        learned, the metrics say so (`learner/skipped_update`), and the version advances all the same.

        Args:
            trajectories: of `trajectory.SCHEMA`, with scores; `trajectory.from_rows` makes one.
            step: addresses the order of mini-batches and the learning rate.
            order: of the rows in each epoch; None: drawn from the seed, the step and the epoch.
            drop_flat: leave out groups whose scores are all equal too; see `trajectory.find_flat`.

        Raises:
            ValueError: the table is not what the exchange promises.
            NonFiniteError: a loss or its gradient is not finite; the weights are as before that mini-batch.
            PeersLost: another rank is gone.
        """
        scored = batch = ResponseBatch.from_table(trajectories)
        if drop_flat:
            batch = scored.take(np.flatnonzero(~trajectory.find_flat(trajectories)[scored.kept]))
        if self._owns_optimizer:
            set_learning_rates(self._optimizer, ppo=self._ppo, step=step, num_steps=self._num_steps)
        metrics = summarize_table(trajectories, scored) | {"kl/coef": self.kl_coef}
        if "group_id" in trajectories.column_names:
            metrics["groups/num_learned"] = float(len(np.unique(batch.groups)))
        metrics["learner/learning_rate"] = self._optimizer.param_groups[0]["lr"]
        with self._mark_unfinished():
            self.policy_version += 1
            if batch.num_response_tokens.sum() < 2:
                nothing = dict.fromkeys(trajectory.LEARNED_FIELDS, [None] * trajectories.num_rows)
                learned, skipped = trajectory.with_learned(trajectories, nothing), {"learner/skipped_update": 1.0}
                return UpdateReport(step, metrics | skipped, self.kl_coef, learned)
            seconds = Stopwatch()
            outputs, forward = self._run_models(batch, step)
            metrics |= seconds.lap("time/old_s")
            self._moments = self._moments.include(scored.scores)
            experience = estimate(outputs, batch, self._ppo, self.kl_coef, self._moments)
            columns = {name: batch.to_lists(getattr(experience, name)) for name in trajectory.LEARNED_FIELDS}
            learned = trajectory.with_learned(trajectories, columns)
            metrics |= summarize_experience(experience, batch, self._ppo, self.kl_coef)
            metrics |= seconds.lap("time/estimate_s")
            draw = order or draw_order(batch.num_sequences, self._seed, step)
            how = draw, self.kl_coef, self._trains_values_only(step), forward
            self._offload.fetch("optimizer")
            try:
                reports, stopped_early = self._updater.run_epochs(batch, experience, *how)
            except NonFiniteMinibatch as error:
                raise NonFiniteError(f"learner: at step {step}, {error}", learned.take(error.rows)) from error
            self._offload.put_away("optimizer")
            metrics |= summarize_minibatches(reports, metrics.get("returns/std"))
            if not self._trains_values_only(step):  # else the KL is that of a policy that must not move
                self.controller = self.controller.adapt(metrics["kl/per_sequence"], batch.num_sequences)
            metrics |= seconds.lap("time/update_s")
        metrics |= {"policy/early_stopped": float(stopped_early), "learner/skipped_update": 0.0} | measure_compilation()
        return UpdateReport(step, metrics, self.kl_coef, learned, tuple(reports))

    def measure_kl(self, trajectories: pa.Table) -> float:
        """Return log(policy / reference) summed over a response's tokens, mean over responses; all ranks call it."""
        outputs, _ = self._run_models(ResponseBatch.from_table(trajectories, scored_only=False))
        return float((outputs.old_logprobs - outputs.ref_logprobs).double().sum(1).mean())

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the policy's full weights by their Hugging Face names, one at a time; a tied head is listed once.

        All ranks go through them together.
        """
        yield from self._sharding.weights()

    def named_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the policy's full adapters alone, B scaled, one at a time; as `named_weights`."""
        from ppo_ray.models.lora import scale_adapters

        yield from scale_adapters(self._policy.causal_lm, gather_full)

    def weights(self, wire: Wire | None = None, buffers: Buffers | None = None) -> WeightSnapshot:
        """Copy the policy's weights to the host; arguments as in `WeightSnapshot.take`. All ranks call it."""
        return WeightSnapshot.take(self.named_weights(), self.policy_version, wire, buffers)

    def num_buckets(self, wire: Wire, adapters_alone: bool = False) -> int:
        """Return the number of buckets that `weights`, or the adapters alone, take, without making one."""
        if not adapters_alone:
            return num_buckets(map(wire.num_bytes, self._sharding.meta_weights()), wire.bucket_bytes)
        from ppo_ray.models.lora import adapter_parameters

        return num_buckets(map(wire.num_bytes, adapter_parameters(self._policy.causal_lm).values()), wire.bucket_bytes)

    def value_head(self) -> dict[str, np.ndarray]:
        """Copy the value head, if there is one: `weight` `[1, H]` and `bias` `[1]`; all ranks call it."""
        state = self._policy.value_head.state_dict() if self._policy.value_head is not None else {}
        return {name: gather_full(tensor).cpu().numpy().copy() for name, tensor in state.items()}

    def save(self, path: Path) -> None:
        """Write the state into a new folder that all ranks see; all call this, and `load` restores it exactly."""
        self.take_snapshot().write(path)

    def take_snapshot(self, buffers: Buffers | None = None) -> LearnerSnapshot:
        """Take the learner's whole state into host memory, each rank a part of it; all ranks call this.

        Args:
            buffers: memory for a copy, which the next snapshot in them overwrites. None: `LearnerSnapshot.take`.

        Raises:
            CheckpointError: the last update was not finished; the weights are neither the old nor the new ones.
            PeersLost: another rank is gone.
        """
        if self._unfinished:
            raise CheckpointError("the learner's last update was not finished, so its state is not saved")
        files = self._policy.list_files(self._sharding.state())
        files.append(optimizer_file(self._optimizer, self._policy, self._sharding))
        scalars = self.policy_version, self.kl_coef, self._moments
        state = LearnerState(*scalars, "", self._checksums.reference, by_tensor=True)
        ranks = self._layout.ranks
        return LearnerSnapshot.take(files, state, self._checksums, self._plain_files, ranks, buffers)

    def probe(self, wire: Wire | None = None) -> WeightProbe:
        """Return a probe of whether engines compute with the weights they are sent; all ranks make its calls."""
        return WeightProbe(self._policy, self._sharding, self._layout, derive_seed(self._seed, "probe"), wire or Wire())

    def _run_models(self, batch: ResponseBatch, step: int | None = None) -> tuple[ModelOutputs, Forward | None]:
        """Run policy and reference; in a step keep the policy's graph where the first mini-batch can use it."""
        keep = step is not None and not self._trains_values_only(step) and self._updater.first_pass_is_whole(batch)
        self._offload.fetch("reference")
        with detect_lost_peers(self._layout.ranks.rank):
            found = run_models(self._policy, self._reference, batch, self._layout, self._ppo, keep)
        self._sharding.release_gathered(backward_follows=keep)
        self._offload.put_away("reference")
        return found

    def _trains_values_only(self, step: int) -> bool:
        return step < self._ppo.value_warmup_steps

    @contextlib.contextmanager
    def _mark_unfinished(self) -> Iterator[None]:
        """Mark the state as unfit to be saved; an update that breaks off in the block leaves it so."""
        self._unfinished = True
        yield
        self._unfinished = False

    @cached_property
    def _plain_files(self) -> dict[str, bytes]:
        """What does not change from one checkpoint to the next; the first rank writes it."""
        dtype = next(iter(self._sharding.state().values())).dtype
        return make_plain_files(self._policy, self._tokenizer, dtype) if self._layout.ranks.leads else {}

    def _restore(self, checkpoint: Path, model: ModelConfig) -> None:
        """Take over what lies beside the models that were loaded from a checkpoint."""
        state = LearnerState.read(checkpoint)
        self.policy_version, self._moments = state.policy_version, state.moments
        self.controller = replace(self.controller, kl_coef=state.kl_coef)
        load_optimizer_state(checkpoint, self._optimizer, self._policy, self._sharding, self._offload)
        if not self._checksums.has_reference(state):
            raise InputError(
                f"the reference model ({model.reference_path or model.path}) is not the one that the run began with; "
                f"the KL penalty would be another. Put the first one back, or begin a new run from {checkpoint}"
            )
        if not self._checksums.has_weights(state):
            raise CheckpointError(f"{checkpoint}: its weights, loaded, are not those that were saved")
