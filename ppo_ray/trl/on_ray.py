"""The trainer's backend on Ray: vLLM engines generate, a learner updates, its weights go back to engines and model."""

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.actors.placement import reserve
from ppo_ray.actors.session import ray_session
from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.events import Event
from ppo_ray.learner.group import LearnerGroup
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.models.actor_critic import VALUE_HEAD_FILE, save_value_head
from ppo_ray.models.saving import save_model
from ppo_ray.models.tokens import read_end_tokens
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.rollout.group import RolloutGroup
from ppo_ray.rollout.support import find_engine_problem
from ppo_ray.trl.config import PPOConfig
from ppo_ray.trl.generation import GenerateCall
from ppo_ray.trl.limits import TokenIds
from ppo_ray.trl.modeling import AutoModelForCausalLMWithValueHead

_LOG = logging.getLogger(__name__)
_NUM_PROBES = 8
_SECTIONS = ("output_dir", "rollout", "learner", "ray")
_ARGUMENTS = {
    "max_new_tokens",
    "do_sample",
    "top_k",
    "top_p",
    "temperature",
    "min_length",
    "pad_token_id",
    "eos_token_id",
}
"""Arguments of `generate` that engines honour: those of the full softmax, and of the length."""


class OnRay:
    """The backend of rollout workers and a learner as Ray actors; the caller's model is a copy that follows theirs."""

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: AutoModelForCausalLMWithValueHead,
        tokenizer: Any,
        options: Sequence[str],
    ) -> None:
        """Write the models out, start the actors and wait until all engines serve the model's weights.

        Args:
            config: the trainer's.
            model: copied to the actors, and brought up to date after each update.
            ref_model: copied to the learner.
            tokenizer: the models'.
            options: ppo_ray's of rollout, learner and ray, as on the command line, e.g. `["rollout.workers=2"]`. On
                several nodes `output_dir`, which the models are written to, must be a folder that all of them see.

        Raises:
            ValueError: a parameter of the model is frozen, which the learner would not know.
            InputError: an option is wrong, nothing can end a response, vLLM cannot serve the model, or the machine
                cannot hold the actors.
            WorkerError: an actor did not start, or an engine does not compute with the weights that it was sent.
        """
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"frozen parameters ({frozen[0]}, ...) cannot be honoured on Ray: all are trained there")
        self._model, self._sampled = model, 0
        self.kl_coef, self._version = config.init_kl_coef, 0
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ppo_ray-"))
            self._config = _make_config(config, folder, options)
            if problem := find_engine_problem(self._config.rollout, model.config):
                raise InputError(f"on_ray: {problem}")
            _write_models(self._config, model, ref_model, tokenizer)
            ends = read_end_tokens(self._config, tokenizer)
            self._ends = ends.ids
            _LOG.info("%s", ends.describe(tokenizer))
            stack.enter_context(ray_session(self._config.ray))
            seats = stack.enter_context(reserve(self._config, ["rollout", "learner"]))
            self._rollout = RolloutGroup(self._config, _log_event, seats)
            stack.callback(self._rollout.close)
            self._rollout.setup()
            self._learner = LearnerGroup(self._config, None, _log_event, seats)
            stack.callback(self._learner.close)
            self._learner.setup()
            if self._config.rollout.self_check:
                self._rollout.check_engines(self._learner, _make_probes(self._config, model.config.get_text_config()))
            self._rollout.load_weights(self._learner.publish())
            self._stack = stack.pop_all()

    def generate(self, call: GenerateCall, by_reference: bool = False) -> TokenIds:
        """Sample with the engines, all prompts at once; lengths are drawn as in process, once per `batch_size` prompts.

        Raises:
            ValueError: an argument is not for engines, the temperature is not theirs, or the reference is asked.
        """
        self._check(call, by_reference)
        prompts = call.queries if isinstance(call.queries, list) else [call.queries]
        default = call.arguments.get("max_new_tokens", 20)  # transformers' default
        starts = range(0, len(prompts), call.batch_size)
        drawn = [call.length_sampler() if call.length_sampler else default for _ in starts]
        limits = tuple(drawn[index // call.batch_size] for index in range(len(prompts)))
        sample_ids = tuple(range(self._sampled, self._sampled + len(prompts)))
        self._sampled += len(prompts)
        batch = PromptBatch(sample_ids, tuple(tuple(prompt.tolist()) for prompt in prompts), limits)
        table = self._rollout.generate(batch, self._version, keep_weights=True).fetch()
        responses = [torch.from_numpy(ids.astype(np.int64)) for ids in trajectory.ragged(table, "response_ids")]
        if call.return_prompt:
            responses = [torch.cat([prompt.cpu(), ids]) for prompt, ids in zip(prompts, responses, strict=True)]
        return responses if isinstance(call.queries, list) else responses[0][None]

    def update(self, table: pa.Table, orders: list[np.ndarray], temperature: float) -> UpdateReport:
        """Make one update in the learner, send its weights to the engines, verified, and into the caller's model."""
        report = self._learner.step(table, self._version, orders, self.kl_coef)
        weights, value_head = self._learner.publish(), self._learner.value_head()
        self.kl_coef, self._version = report.kl_coef, weights.policy_version
        self._rollout.load_weights(weights)
        parameters = dict(self._model.pretrained_model.named_parameters())
        with torch.no_grad():
            for name, tensor in self._learner.fetch_weights(weights).tensors():
                parameters[name].copy_(tensor)
            for name, parameter in self._model.v_head.summary.named_parameters():
                parameter.copy_(torch.from_numpy(value_head[name].copy()))
        return report

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        self._stack.close()

    def _check(self, call: GenerateCall, by_reference: bool) -> None:
        """Raise ValueError for what the engines cannot honour."""
        arguments = call.arguments
        if by_reference:
            raise ValueError("generate_ref_response cannot be honoured on Ray: the engines hold the policy alone")
        unknown = sorted(set(arguments) - _ARGUMENTS)
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} cannot be honoured on Ray; engines take {', '.join(sorted(_ARGUMENTS))}"
            )
        if "eos_token_id" in arguments and call.ends != self._ends:
            raise ValueError(
                f"eos_token_id={arguments['eos_token_id']}: on Ray responses end at {list(self._ends)}: at the "
                "tokenizer's end of sequence and those of the model's generation config, or at none with "
                "on_ray=['rollout.stop_at_eos=false']; leave eos_token_id out"
            )
        wanted, given = self._config.rollout.temperature, arguments.get("temperature", 1.0)
        if given != wanted:
            raise ValueError(f"temperature={given}: on Ray it is said once, on_ray=['rollout.temperature={given}']")


def _make_probes(config: Config, model: Any) -> PromptBatch:
    """Make prompts for a check of the engines, of any token ids: a script's own are not known yet.

    Args:
        config: whose engines are checked.
        model: config of the model, of transformers.
    """
    width = config.prompts.max_tokens  # for which, and a longest response, there is room
    ids = np.linspace(0, model.vocab_size - 1, _NUM_PROBES * width, dtype=np.int64).reshape(width, _NUM_PROBES).T
    limits = (config.rollout.max_response_tokens,) * _NUM_PROBES
    return PromptBatch(tuple(range(_NUM_PROBES)), tuple(map(tuple, ids.tolist())), limits)


def _log_event(event: Event) -> None:
    _LOG.warning("%s", event.message)


def _make_config(config: PPOConfig, folder: str, options: Sequence[str]) -> Config:
    """Make a config of ppo_ray's; its prompts and rewards are placeholders, which a trainer does not use.

    Raises:
        InputError: an option is wrong or cannot be set here.
    """
    others = [option for option in options if option.partition("=")[0].partition(".")[0] not in _SECTIONS]
    if others:
        raise InputError(
            f"on_ray: {', '.join(others)} cannot be set here, only output_dir and what is in rollout, learner and ray: "
            "the algorithm is the PPOConfig's, models and scores are the script's"
        )
    given = load_config(
        None,
        [
            f"output_dir={folder}",
            "model.path=policy",
            "prompts.path=the-script's",
            "prompts.max_tokens=1",  # the script's as well, as the next
            "rollout.max_response_tokens=1",
            "rollout.max_context=512",
            "reward.function=the_script:itself",
            f"seed={config.seed}",
            f"rollout.batch_size={config.batch_size}",
            *options,
        ],
    )
    if given.rollout.wire_dtype is not None or given.rollout.weight_transport not in ("auto", "object_store"):
        raise InputError(
            "rollout.wire_dtype and rollout.weight_transport cannot be set here: the model that follows the learner's "
            "gets its weights from the object store, unrounded"
        )
    rollout = given.rollout.model_copy(update={"weight_transport": "object_store"})
    base = Path(given.output_dir)
    model = given.model.model_copy(update={"path": str(base / "policy"), "reference_path": str(base / "reference")})
    return given.model_copy(update={"model": model, "ppo": config.to_ppo_ray(), "rollout": rollout})


def _write_models(
    config: Config,
    model: AutoModelForCausalLMWithValueHead,
    ref_model: AutoModelForCausalLMWithValueHead,
    tokenizer: Any,
) -> None:
    """Write both models where the actors will load them."""
    for one, path in ((model, config.model.path), (ref_model, str(config.model.reference_path))):
        save_model(one.pretrained_model, path)
        tokenizer.save_pretrained(path)
    save_value_head(Path(config.model.path) / VALUE_HEAD_FILE, model.v_head.summary.state_dict())
