"""TRL 0.11's PPOTrainer on ppo_ray's learner: `generate`, `step(queries, responses, scores)`, `log_stats`."""

import inspect
import random
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from ppo_ray.learner.reports import UpdateReport
from ppo_ray.trl.backend import Backend, InProcess, build_trajectories
from ppo_ray.trl.config import PPOConfig
from ppo_ray.trl.generation import GenerateCall, sampling_temperature
from ppo_ray.trl.limits import check_queries, find_ends, find_limits
from ppo_ray.trl.modeling import AutoModelForCausalLMWithValueHead, create_reference_model
from ppo_ray.trl.statistics import make_accelerator, make_log_entries, step_statistics


class KLControl:
    """The KL controller as TRL shows it: `value` is the penalty's weight in the next step, and may be set."""

    def __init__(self, backend: Backend) -> None:
        """Show and set a backend's `kl_coef`."""
        self._backend = backend

    @property
    def value(self) -> float:
        """Weight of the KL penalty."""
        return self._backend.kl_coef

    @value.setter
    def value(self, value: float) -> None:
        self._backend.kl_coef = float(value)


class PPOTrainer:
    """Trains a model with a value head by PPO: TRL 0.11's class, its arguments and its attributes.

    Everything is computed as TRL computes it, but where TRL errs unseen (`docs/trl.md`): gradients are clipped at every
    step, dropout is off while responses are sampled, and the temperature that `generate` sampled at counts in `step`.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: AutoModelForCausalLMWithValueHead | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Callable[..., Any] | None = None,
        on_ray: Sequence[str] | None = None,
    ) -> None:
        """Seed `random`, numpy and torch, and set up the learner.

        Args:
            config: the options.
            model: trained in place.
            ref_model: frozen; None: a copy of the model as it is, or a model with adapters without them.
            tokenizer: the model's.
            dataset: of torch or datasets, for `dataloader`; None: the script brings its own batches.
            optimizer: of the model's parameters; None: Adam with `config.learning_rate`.
            data_collator: of the dataloader.
            num_shared_layers: first layers that model and reference share and that stay as they are.
            lr_scheduler: of the optimizer; it steps once per `step`.
            training_data_collator: cannot be honoured: sequences are laid out in rows without padding.
            on_ray: None: everything in this process. Options of ppo_ray, e.g. `["rollout.workers=2"]`: vLLM engines
                generate and a learner updates, as Ray actors; `model` follows them. End with `close`.

        Raises:
            ValueError: an argument is not what it should be, or cannot be honoured.
        """
        config = config if config is not None else PPOConfig()
        _check_arguments(config, model, ref_model, tokenizer, lr_scheduler, training_data_collator)
        assert model is not None and tokenizer is not None
        if ref_model is not None and num_shared_layers is not None:
            warnings.warn("num_shared_layers is ignored: a ref_model is given", UserWarning, stacklevel=2)
        if on_ray is not None and model.is_peft_model:
            raise ValueError("adapters cannot be honoured on Ray: set model.lora in a config of ppo-ray train")
        for name, own in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if on_ray is not None and own is not None:
                raise ValueError(f"{name} cannot be honoured on Ray: the learner makes its own Adam with learning_rate")
        set_seed(config.seed)
        self.config, self.tokenizer, self.dataset = config, tokenizer, dataset
        self.accelerator = make_accelerator(config)
        self.current_device = self.accelerator.device
        config.world_size = 1
        config.global_backward_batch_size, config.global_batch_size = config.backward_batch_size, config.batch_size
        config.is_encoder_decoder = self.is_encoder_decoder = False
        config.is_peft_model = self.is_peft_model = model.is_peft_model
        self.is_distributed = False
        self.model = model.to(self.current_device).eval()
        self.ref_model = ref_model
        if ref_model is None and not model.is_peft_model:  # else it is the model without its adapters
            self.ref_model = create_reference_model(model, num_shared_layers)
        if self.ref_model is not None:
            self.ref_model = self.ref_model.to(self.current_device).requires_grad_(False).eval()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer or torch.optim.Adam(trained, lr=config.learning_rate)
        self.lr_scheduler = lr_scheduler
        self.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.dataloader = self.prepare_dataloader(dataset, data_collator) if dataset is not None else None
        self._backend: Backend
        if on_ray is None:
            self._backend = InProcess(config, self.model, self.ref_model, tokenizer, self.optimizer)
        else:
            from ppo_ray.trl.on_ray import OnRay  # Ray is not needed otherwise

            assert self.ref_model is not None
            self._backend = OnRay(config, self.model, self.ref_model, tokenizer, on_ray)
        self.kl_ctl = KLControl(self._backend)
        self.current_step = 0
        self._temperature: float | None = None  # of the responses of this step, as are the ids that ended them
        self._ends: set[int] = set()

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> Any:
        """Make a shuffling dataloader of whole batches; a datasets Dataset loses the columns that nothing takes."""
        if hasattr(dataset, "column_names") and self.config.remove_unused_columns:
            taken = {*inspect.signature(self.model.forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in taken])
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )
        return self.accelerator.prepare(loader)

    def generate(
        self,
        query_tensor: torch.Tensor | list[torch.Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample responses with transformers' `generate`, dropout off.

        Args:
            query_tensor: `[P]` token ids of one prompt, or a list of such.
            length_sampler: draws `max_new_tokens`, once per `batch_size` prompts.
            batch_size: prompts of a list that are sampled together.
            return_prompt: whether the prompt is part of what is returned.
            generate_ref_response: whether the reference model answers too.
            **generation_kwargs: for `generate`; it must sample from the full softmax.

        Returns:
            For one prompt `[1, T]`; for a list a list of `[T]`, without padding, up to the first token that ends a
            response: the tokenizer's end of sequence, each `eos_token_id` of the model's generation config, or, if
            `eos_token_id` is given, that alone.
            With `generate_ref_response` a pair: the model's and the reference's.

        Raises:
            ValueError: it would not sample from the full softmax, or at another temperature than earlier responses of
                the same step; or the model does not know a prompt's ids.
        """
        temperature = sampling_temperature(self.model.pretrained_model.generation_config, generation_kwargs)
        if self._temperature not in (None, temperature):
            raise ValueError(
                f"generate(temperature={temperature:g}): earlier responses of this step were sampled at "
                f"{self._temperature:g}; the responses of a step must share one temperature"
            )
        limits = find_limits(self.model.pretrained_model)
        check_queries(query_tensor, limits)
        ends = find_ends(self.model.pretrained_model, self.tokenizer, generation_kwargs, limits)
        self._temperature = temperature
        self._ends.update(ends)
        call = GenerateCall(query_tensor, length_sampler, batch_size, return_prompt, generation_kwargs, ends)
        answer = self._backend.generate(call)
        return (answer, self._backend.generate(call, by_reference=True)) if generate_ref_response else answer

    def step(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        scores: list[torch.Tensor],
        response_masks: list[torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Make one PPO update.

        Args:
            queries: `batch_size` prompts, `[P]` token ids each.
            responses: their responses, `[R]` token ids each.
            scores: their scores, one number each.
            response_masks: cannot leave tokens out; None or all ones.

        Returns:
            TRL's statistics: see `statistics.step_statistics`, and the seconds of each part.

        Raises:
            ValueError: the batch is not what it should be; nothing was learnt.
            NonFiniteError: the loss or its gradient is not finite; the weights are as before that mini-batch.
        """
        started = time.perf_counter()
        limits = find_limits(self.model.pretrained_model)
        ends = self._ends or find_ends(self.model.pretrained_model, self.tokenizer, {}, limits)
        table = build_trajectories(queries, responses, scores, response_masks, self.config.batch_size, ends, limits)
        temperature, self._temperature, self._ends = self._temperature or 1.0, None, set()
        update, orders = self._update(table, temperature)
        counted = time.perf_counter()
        stats = step_statistics(update, orders, self.config.mini_batch_size)
        if stats["objective/kl"] < -1:
            warnings.warn(
                f"the KL to the reference is negative: {stats['objective/kl']:.2f}. Check that responses are sampled "
                "from the full softmax by this very model.",
                UserWarning,
                stacklevel=2,
            )
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.config.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        now = time.perf_counter()
        return stats | {
            "time/ppo/forward_pass": update.metrics["time/old_s"],
            "time/ppo/compute_rewards": 0.0,  # both in one pass over the tokens
            "time/ppo/compute_advantages": update.metrics["time/estimate_s"],
            "time/ppo/optimize_step": update.metrics["time/update_s"],
            "time/ppo/calc_stats": now - counted,
            "time/ppo/total": now - started,
        }

    def _update(self, table: pa.Table, temperature: float) -> tuple[UpdateReport, list[np.ndarray]]:
        """Update with the rows in the orders that TRL would draw, and leave numpy's generator where TRL would."""
        size, state = self.config.batch_size, np.random.get_state()
        orders = [np.random.permutation(size) for _ in range(self.config.ppo_epochs)]
        update = self._backend.update(table, orders, temperature)
        num_epochs = -(-len(update.minibatches) * (self.config.backward_batch_size or size) // size)
        np.random.set_state(state)
        return update, [np.random.permutation(size) for _ in range(num_epochs)]

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Iterable[torch.Tensor],
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Log statistics, the scores, and for wandb a table of texts, with the tracker of `log_with`.

        Args:
            stats: of `step`.
            batch: texts and whatever else, by column.
            rewards: the scores of the batch.
            columns_to_log: of the batch, for the table.

        Raises:
            ValueError: a column is not in the batch (wandb only).
        """
        scores = torch.tensor([float(reward) for reward in rewards])
        logs = make_log_entries(stats, batch, scores, list(columns_to_log), self.config.log_with)
        step = None
        if self.config.log_with == "tensorboard":
            step = self.current_step = self.current_step + 1
        self.accelerator.log(logs, step=step)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write model, value head and tokenizer, as TRL does."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Push model, value head and tokenizer to the hub."""
        self.model.push_to_hub(repo_id, **kwargs)
        self.tokenizer.push_to_hub(repo_id, **kwargs)

    def close(self) -> None:
        """End what was started on Ray; the model stays as it is."""
        self._backend.close()


def set_seed(seed: int) -> None:
    """Seed the global generators of `random`, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, lr_scheduler: Any, training_data_collator: Any
) -> None:
    """Raise ValueError for an argument of `PPOTrainer` that is of another type, or cannot be honoured."""
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a ppo_ray.trl.PPOConfig, not {type(config)}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer)}")
    for name, given in (("model", model), ("ref_model", ref_model)):
        if not isinstance(given, AutoModelForCausalLMWithValueHead) and (name == "model" or given is not None):
            raise ValueError(f"{name} must be a ppo_ray.trl.AutoModelForCausalLMWithValueHead, not {type(given)}")
    if training_data_collator is not None:
        raise ValueError("training_data_collator cannot be honoured: sequences are laid out without padding")
    if lr_scheduler is not None and not isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise ValueError(f"lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, not {type(lr_scheduler)}")
