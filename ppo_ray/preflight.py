"""Checks before any actor starts: models, labels, texts, reward function, CPU threads, weight transport, output folder.

Each check yields a line for everything that cannot be used, so that all of it is reported at once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_ray.config import Config, ModelConfig, RewardConfig, Trust, in_job, transport_problems
from ppo_ray.errors import InputError, first_line
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.prompts.texts import UsableTexts, read_usable_texts
from ppo_ray.reward.function import load_function
from ppo_ray.reward.labels import find_label


@dataclass
class Inputs:
    """What the checks have read and the run works with, so that it is read once."""

    tokenizer: Any = None
    """The policy's own, of transformers."""
    vocab_size: int = 0
    """Of the policy."""
    texts: UsableTexts | None = None

    def open_prompts(self, config: Config) -> PromptStream:
        """Return the run's prompts, from their beginning."""
        held_out, vocab_size = config.evaluation.num_prompts, self.vocab_size
        return PromptStream(
            config.prompts, self.tokenizer, config.seed, held_out, vocab_size=vocab_size, texts=self.texts
        )


def check(config: Config) -> Inputs:
    """Check what the config names; neither Ray nor vLLM is started or imported.

    Whether a cluster has enough CPUs and GPUs is checked when they are reserved: only Ray knows it.

    Returns:
        What was read.

    Raises:
        InputError: a line for everything that cannot be used.
    """
    inputs = Inputs()
    problems = [*_cpu_problems(config), *transport_problems(config), *_policy_problems(config, inputs)]
    problems += [*_reward_problems(config), *_prompt_problems(config, inputs)]
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
    cpus = os.cpu_count() or 1
    for phase, (options, threads) in phase_demands(config).items():
        if threads > cpus:
            yield f"{options}: {phase} wants {threads} CPU threads, but this machine has {cpus} CPUs; lower it"


def _policy_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    model, problem = _load_model_config("model.path", config.model.path, config.model.trust)
    if problem:
        yield problem
    else:
        inputs.tokenizer, problem = _load_tokenizer("model.path", config.model)
        inputs.vocab_size = _num_tokens(model) or 0
        if problem:
            yield problem
        if not inputs.vocab_size:
            yield f"model.path={config.model.path}: its config has no vocab_size; give a language model"
        positions = getattr(model.get_text_config(), "max_position_embeddings", None)
        if positions and config.rollout.max_context > positions:
            yield (
                f"rollout.max_context={config.rollout.max_context}: {config.model.path} has only {positions} positions;"
                f" set it to {positions} or less"
            )
    for key, path in (("reference", config.model.reference_path), ("critic", config.model.critic_path)):
        if path in (None, config.model.path):
            continue
        other, problem = _load_model_config(f"model.{key}_path", str(path), config.model.trust)
        if problem:
            yield problem
        elif model is not None and (ours := _num_tokens(model)) != (theirs := _num_tokens(other)):
            yield (
                f"model.{key}_path={path}: has a vocabulary of {theirs} tokens, model.path one of {ours}; a {key} must "
                "share the policy's tokenizer"
            )


def _num_tokens(model: Any) -> int | None:
    return getattr(model.get_text_config(), "vocab_size", None)


def _reward_problems(config: Config) -> Iterator[str]:
    reward = config.reward
    if reward.function is not None:
        try:
            load_function(reward.function)
        except InputError as error:
            yield str(error)
        except Exception as error:  # whatever the user's own module raises when it is imported
            yield f"reward.function={reward.function}: importing it raised {type(error).__name__}: {error}"
        return
    classifier, problem = _load_model_config("reward.path", str(reward.path), reward.trust)
    if problem:
        yield problem
        return
    _, problem = _load_tokenizer("reward.path", reward)
    if problem:
        yield problem
    try:
        find_label(classifier.id2label or {}, reward.label, str(reward.path))
    except InputError as error:
        yield str(error)


def _prompt_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    try:
        inputs.texts = read_usable_texts(config.prompts, config.evaluation.num_prompts)
    except InputError as error:
        yield str(error) + _asset_hint(config.prompts.path)


def _load_model_config(key: str, path: str, trust: Trust) -> tuple[Any, str | None]:
    """Load a model's own config; return it, or None and what is wrong with the model."""
    from transformers import AutoConfig, PreTrainedConfig

    folder = Path(path)
    if not folder.is_dir() and (path.startswith((".", "/")) or path.count("/") > 1 or folder.exists()):
        return None, f"{key}={path}: missing model: no such folder{_asset_hint(path)}"
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust.remote_code)
    except Exception as error:  # OSError, ValueError, whatever a hub client raises, or the model's own code
        if not trust.remote_code and _has_code(lambda path: PreTrainedConfig.get_config_dict(path)[0], path):
            return None, _code_problem(key, path, "the model (auto_map in config.json)")
        where = "its config cannot be loaded" if folder.is_dir() else "neither a folder here nor to be had from the hub"
        return None, f"{key}={path}: missing model: {where}: {first_line(error)}{_asset_hint(path)}"
    return model, _weights_problem(key, folder, trust) if folder.is_dir() else None


def _weights_problem(key: str, folder: Path, trust: Trust) -> str | None:
    """Say what is wrong if a local folder has no safetensors: pickled weights can run any code, and need consent."""
    if any(folder.glob("*.safetensors")):
        return None
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    loadable = any(folder.glob("pytorch_model*.bin"))
    if loadable and trust.pickles:
        return None
    if pickles:
        unless = f" unless {key.partition('.')[0]}.allow_pickled_weights=true" if loadable else ""
        return (
            f"{key}={folder}: holds pickled weights only ({', '.join(pickles[:3])}), which are not loaded{unless}; "
            "better convert them: load them where you trust them and save_pretrained(...)"
        )
    return f"{key}={folder}: missing model: the folder holds no *.safetensors"


def _has_code(read: Callable[[str], Any], path: str) -> bool:
    """Say whether the config of a model or tokenizer, which `read` returns, names Python code that lies with it."""
    try:
        return "auto_map" in read(path)
    except Exception:  # what is wrong with it is said elsewhere
        return False


def _code_problem(key: str, path: str, what: str) -> str:
    return (
        f"{key}={path}: {what} needs Python code that lies with it, which is not run unless "
        f"{key.partition('.')[0]}.trust_remote_code=true; read it first, it runs with your rights"
    )


def _load_tokenizer(key: str, model: ModelConfig | RewardConfig) -> tuple[Any, str | None]:
    """Load a tokenizer; return it, or None and what is wrong: it is missing, or not the one its authors meant.

    Where transformers must not run a tokenizer's own code it may silently build another tokenizer from the other files,
    which can split texts in another way than the model was trained on.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path, trust = str(model.path), model.trust
    if not trust.remote_code and _has_code(get_tokenizer_config, path):
        return None, _code_problem(key, path, "the tokenizer (auto_map in tokenizer_config.json)")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust.remote_code), None
    except Exception as error:  # each tokenizer library has its own errors
        return None, f"{key}={path}: its tokenizer cannot be loaded: {first_line(error)}"


def _asset_hint(path: str) -> str:
    """Return how to build what is missing, if it is one of our own assets."""
    from ppo_ray.assets.cache import ASSETS, asset_path

    ours = {str(asset_path(name)) for name in ASSETS}
    return "; build it with `ppo-ray assets imdb`" if path in ours and not Path(path).exists() else ""
