"""Checks before any actor starts: models, labels, texts, rewards, CPU threads, weight transport, output folder.

Each check yields a line for everything that cannot be used, so that all of it is reported at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_ray.config import Config, Trust, in_job, tracking_problems, transport_problems
from ppo_ray.errors import InputError
from ppo_ray.machine import count_cpus, import_ahead
from ppo_ray.models.folder import asset_hint, read_config, read_tokenizer
from ppo_ray.models.support import check_head, find_config_problem, find_positions, max_exact_tokens
from ppo_ray.models.tokens import EndTokens, read_end_tokens
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.prompts.texts import UsableTexts, count_shared, read_usable_texts
from ppo_ray.reward.checks import reward_problems


@dataclass
class Inputs:
    """What the checks have read and the run works with, so that it is read once."""

    tokenizer: Any = None
    """The policy's own, of transformers."""
    vocab_size: int = 0
    """Of the policy."""
    texts: UsableTexts | None = None
    sets: dict[str, UsableTexts] = field(default_factory=dict)
    """The texts of `evaluation.sets`, by name."""
    end_tokens: EndTokens | None = None
    """What ends a response."""
    notes: list[str] = field(default_factory=list)
    """What can be used and is worth knowing, a line each."""

    def describe_ends(self) -> str | None:
        """Say which tokens end a response; None: they were not read."""
        return None if self.end_tokens is None else self.end_tokens.describe(self.tokenizer)

    def open_prompts(self, config: Config, show: Callable[[str], None]) -> PromptStream:
        """Return the run's prompts, from their beginning; `show` as `PromptStream`."""
        return PromptStream(
            config.prompts,
            self.tokenizer,
            config.seed,
            config.evaluation.num_prompts,
            vocab_size=self.vocab_size,
            texts=self.texts,
            responses_per_prompt=config.rollout.responses_per_prompt,
            show=show,
        )

    def open_sets(self, config: Config) -> dict[str, PromptBatch]:
        """Return the prompts of `evaluation.sets`, by name."""
        return {
            name: PromptStream(
                texts.config,
                self.tokenizer,
                config.seed,
                config.evaluation.sets[name].num_prompts,
                vocab_size=self.vocab_size,
                texts=texts,
                trains=False,
            ).held_out()
            for name, texts in self.sets.items()
        }


def check(config: Config) -> Inputs:
    """Check what the config names; neither Ray nor vLLM is started or imported.

    Whether a cluster has enough CPUs and GPUs is checked when they are reserved: only Ray knows it.

    Returns:
        What was read.

    Raises:
        InputError: a line for everything that cannot be used.
    """
    import_ahead("ppo_ray.models.loading")
    inputs = Inputs()
    problems = [*_cpu_problems(config), *transport_problems(config), *tracking_problems(config.tracking)]
    problems += _policy_problems(config, inputs)
    problems += [*_end_problems(config, inputs), *_prompt_problems(config, inputs), *_reward_problems(config, inputs)]
    problems += _loss_problems(config)
    if in_job():
        problems = [*output_problems(config), *problems]
    refuse(problems, "nothing was started")
    return inputs


def refuse(problems: Sequence[str], consequence: str) -> None:
    """Raise one error for all problems, if there are any.

    Args:
        problems: a line for each.
        consequence: what was not done because of them; it ends the error's first line.

    Raises:
        InputError: there are problems.
    """
    if problems:
        heading = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise InputError("\n".join([f"{heading}, {consequence}", *(f"  {problem}" for problem in problems)]))


def phase_demands(config: Config) -> dict[str, tuple[str, int]]:
    """Return, for each phase of a step, the options that set its CPU threads and how many these are.

    Where generation overlaps with learning, the update goes on beside each of the other phases.
    """
    rollout, reward, learner = config.rollout, config.reward, config.learner
    generation = f"rollout.workers={rollout.workers} x rollout.threads={rollout.threads}"
    scoring = f"reward.workers={reward.workers} x reward.threads={reward.threads}"
    updating = f"learner.workers={learner.workers} x learner.threads={learner.threads}"
    demands = {
        "generation": (generation, rollout.workers * rollout.threads),
        "scoring": (scoring, reward.workers * reward.threads),
    }
    learning = learner.workers * learner.threads
    if not rollout.max_staleness:
        return demands | {"the update": (updating, learning)}
    return {
        f"{phase} beside the update (rollout.max_staleness=1)": (f"{options} + {updating}", threads + learning)
        for phase, (options, threads) in demands.items()
    }


def cpu_demand(config: Config) -> int:
    """Return the CPU threads of the busiest phase: the phases take turns, and the threads of idle actors sleep."""
    return max(threads for _, threads in phase_demands(config).values())


def output_problems(config: Config) -> Iterator[str]:
    """Yield the problem of an output folder in which a job would lose what it writes."""
    if not Path(config.output_dir).is_absolute():
        yield (
            f"output_dir={config.output_dir}: must be absolute, on storage that all nodes share: the folder in which a "
            "job starts lies on one of them and is deleted some time after the job"
        )


def _cpu_problems(config: Config) -> Iterator[str]:
    if not config.ray.is_private:
        return
    cpus = count_cpus()
    for phase, (options, threads) in phase_demands(config).items():
        if threads > cpus:
            yield f"{options}: {phase} wants {threads} CPU threads, but here are {cpus} CPUs to use; lower it"


def _policy_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    from ppo_ray.rollout.support import find_engine_problem  # loads torch

    model, problem = read_config("model.path", config.model.path, config.model.trust)
    if problem:
        yield problem
    else:
        inputs.tokenizer, problem = read_tokenizer("model.path", config.model)
        inputs.vocab_size = _num_tokens(model) or 0
        if problem:
            yield problem
        if not inputs.vocab_size:
            yield f"model.path={config.model.path}: its config has no vocab_size; give a language model"
        else:
            yield from _network_problems(config, "model.path", config.model.path, config.model.trust, model)
            if problem := find_engine_problem(config.rollout, model, config.model.lora):
                yield f"model.path={config.model.path}: {problem}"
        if (positions := find_positions(model)) and config.max_context > positions:
            yield _too_long(config, positions, f"{config.model.path} has only {positions} positions")
    yield from _adapter_problems(config)
    for key, (path, trust) in (("reference", config.model.reference), ("critic", config.model.critic_source)):
        if (path, trust) == (config.model.path, config.model.trust):
            continue
        other, problem = read_config(f"model.{key}_path", path, trust)
        if problem:
            yield problem
        elif model is not None and (ours := _num_tokens(model)) != (theirs := _num_tokens(other)):
            yield (
                f"model.{key}_path={path}: has a vocabulary of {theirs} tokens, model.path one of {ours}; a {key} must "
                "share the policy's tokenizer"
            )
        else:
            yield from _network_problems(config, f"model.{key}_path", path, trust, other)


def _too_long(config: Config, limit: int, why: str) -> str:
    """Return the line for sequences that may be longer than a model's limit, in tokens."""
    if config.rollout.max_context is not None:
        return f"rollout.max_context={config.max_context}: {why}; set it to {limit} or less"
    prompt, response = config.prompts.max_tokens, config.rollout.max_response_tokens
    options = f"prompts.max_tokens={prompt} + rollout.max_response_tokens={response}"
    return f"{options}: {why}; lower them to {limit} together"


def _network_problems(config: Config, key: str, path: str, trust: Trust, model: Any) -> Iterator[str]:
    """Yield what the learner cannot compute of a model, or does not find in its files; no weights are read."""
    from ppo_ray.models.loading import check_weights  # loads torch

    if problem := find_config_problem(model, is_critic := key == "model.critic_path"):
        yield f"{key}={path}: {problem}"
        return
    limit, rope = max_exact_tokens(model) or (config.max_context, "")
    if config.max_context > limit:
        why = f"beyond {limit} tokens, the {rope} positions of {path} depend on the longest sequence of a batch"
        yield _too_long(config, limit, why)
    from ppo_ray.models.adapter_files import check_adapters

    auto_class = "AutoModel" if is_critic else "AutoModelForCausalLM"
    empty, problem = check_weights(key, auto_class, path, trust)
    if problem:
        yield problem
    elif empty is not None:
        try:
            if not is_critic:
                check_head(empty)
            if config.model.lora is not None and key != "model.reference_path":
                check_adapters(empty, config.model, path, is_critic)
        except InputError as error:
            yield f"{key}={path}: {error}"


def _adapter_problems(config: Config) -> Iterator[str]:
    """Yield what is wrong with adapters, as far as it can be told without the model that they adapt."""
    if config.model.lora is None:
        if (Path(config.model.path) / "adapter_config.json").is_file():
            yield (
                f"model.path={config.model.path}: holds adapters (LoRA), not a whole model; give their base as "
                "model.path and this folder as model.lora.path, or make a whole model of both with `ppo-ray merge`"
            )
        return
    from ppo_ray.models.adapter_files import make_adapter_config  # loads torch

    try:
        make_adapter_config(config.model.lora, config.model.path)
    except InputError as error:
        yield f"model.lora.path={config.model.lora.path}: {error}"


def _num_tokens(model: Any) -> int | None:
    return getattr(model.get_text_config(), "vocab_size", None)


def _end_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    """Yield what is wrong with the tokens that end a response; a model that cannot be read is reported already."""
    if inputs.tokenizer is None or not inputs.vocab_size:
        return
    try:
        inputs.end_tokens = read_end_tokens(config, inputs.tokenizer)
    except InputError as error:
        yield str(error)


def _loss_problems(config: Config) -> Iterator[str]:
    """Yield what keeps a policy loss of the user's own from being called."""
    if not config.ppo.own_policy_loss:
        return
    from ppo_ray.learner.surrogate import OwnLoss  # loads torch

    name = config.ppo.policy_loss
    try:
        OwnLoss(name)
    except InputError as error:
        yield str(error)
    except Exception as error:  # whatever the user's own module raises when it is imported
        yield f"ppo.policy_loss={name}: importing it raised {type(error).__name__}: {error}"


def _reward_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    from ppo_ray.rollout.support import find_engine_problem  # loads torch

    yield from reward_problems(config, inputs.texts, inputs.notes)
    for key, source in config.reward.sources:
        if source.judge is not None:
            model, _ = read_config(f"{key}.judge.path", source.judge.path, source.judge.trust)
            rollout = config.rollout.model_copy(update={"engine": source.judge.engine, "gpus": config.reward.gpus})
            if model is not None and (problem := find_engine_problem(rollout, model)):
                words = problem.replace("rollout.engine", f"{key}.judge.engine")
                yield f"{key}.judge.path={source.judge.path}: {words}"


def _prompt_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    try:
        inputs.texts = read_usable_texts(config.prompts, config.evaluation.num_prompts)
    except InputError as error:
        yield str(error) + "".join(asset_hint(str(part.path)) for _, part in config.prompts.parts)
    for name, source in config.evaluation.sets.items():
        try:
            inputs.sets[name] = read_usable_texts(config.prompts.of_set(name, source), 0, key=f"evaluation.sets.{name}")
        except InputError as error:
            yield str(error) + asset_hint(source.path)
    for name, shared in count_shared(inputs.sets, inputs.texts).items() if inputs.texts else ():
        if shared:
            inputs.notes.append(
                f"evaluation.sets.{name}: {shared:,} of its {len(inputs.sets[name]):,} texts are among those of "
                f"{config.prompts.place} too, and the policy may train on them; its figures say less about new texts"
            )
