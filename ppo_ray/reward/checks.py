"""Checks of what scores, before anything starts; each yields a line for everything that cannot be used."""

from collections.abc import Iterator
from typing import Any

from ppo_ray.config import Config, JudgeConfig, RewardSource
from ppo_ray.errors import InputError
from ppo_ray.models.folder import read_config, read_tokenizer
from ppo_ray.models.tokens import read_model_ends
from ppo_ray.prompts.chat import has_template
from ppo_ray.prompts.texts import UsableTexts
from ppo_ray.reward.function import RewardFunction
from ppo_ray.reward.http import describe_exposure, server_problems
from ppo_ray.reward.judge import Question, describe_template_failure
from ppo_ray.reward.labels import check_transform, classifies_text, find_label, token_limit


def reward_problems(config: Config, texts: UsableTexts | None, notes: list[str]) -> Iterator[str]:
    """Yield a line for everything of a reward that cannot be used.

    Args:
        config: of the run.
        texts: of the prompts; None: they cannot be read, which is reported elsewhere.
        notes: what can be used and is worth knowing is added to them.
    """
    for key, source in config.reward.sources:
        if source.function is not None:
            yield from _function_problems(config, texts, key, source.function)
        elif source.url is not None:
            yield from server_problems(config, key, source, texts.take_all() if texts else ())
            notes.extend(describe_exposure(key, source))
        elif source.judge is not None:
            yield from _judge_problems(config, f"{key}.judge", source.judge)
        else:
            yield from _classifier_problems(config, texts, notes, f"{key}.path", source)


def _function_problems(config: Config, texts: UsableTexts | None, key: str, name: str) -> Iterator[str]:
    try:
        arguments = RewardFunction(name, config.prompts.kept_names, key=key).arguments or ()
    except InputError as error:
        yield str(error)
    except Exception as error:  # whatever the user's own module raises when it is imported
        yield f"{key}.function={name}: importing it raised {type(error).__name__}: {error}"
    else:
        if "messages" in arguments and texts and not has_template(config.prompts, texts.are_chats):
            yield (
                f"{key}.function={name}: takes messages, and the prompts are plain texts; set "
                "prompts.chat_template=tokenizer"
            )


def _judge_problems(config: Config, key: str, judge: JudgeConfig) -> Iterator[str]:
    """Yield what keeps a judge from being asked; no weights are read."""
    from ppo_ray.models.loading import check_weights  # loads torch

    try:
        Question(judge.prompt, config.prompts.kept_names)
    except InputError as error:
        yield f"{key}.{error}"
    model, problem = read_config(f"{key}.path", judge.path, judge.trust)
    if problem:
        yield problem
        return
    tokenizer, problem = read_tokenizer(f"{key}.path", judge)
    if problem:
        yield problem
    else:
        try:
            read_model_ends(judge, tokenizer)
        except InputError as error:
            yield f"{key}.{error}"
        if refusal := describe_template_failure(tokenizer):
            yield f"{key}.path={judge.path}: {refusal}"
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    if positions and judge.max_context > positions:
        yield f"{key}.max_context={judge.max_context}: {judge.path} has only {positions} positions; set it to that"
    _, problem = check_weights(f"{key}.path", "AutoModelForCausalLM", judge.path, judge.trust)
    if problem:
        yield problem


def _classifier_problems(
    config: Config, texts: UsableTexts | None, notes: list[str], key: str, source: RewardSource
) -> Iterator[str]:
    from ppo_ray.models.loading import check_weights  # loads torch

    path = str(source.path)
    classifier, problem = read_config(key, path, source.trust)
    if problem:
        yield problem
        return
    tokenizer, problem = read_tokenizer(key, source)
    if problem:
        yield problem
    else:
        yield from _length_problems(config, notes, path, classifier, tokenizer)
        yield from _template_problems(config, texts, key, source, tokenizer)
    if not source.trust.remote_code and not classifies_text(classifier):
        yield f"{key}={path}: transformers has no sequence classifier of the kind {classifier.model_type}"
    else:
        _, problem = check_weights(key, "AutoModelForSequenceClassification", path, source.trust)
        if problem:
            yield problem
    try:
        find_label(classifier.id2label or {}, source.label, path)
        check_transform(source.transform, classifier, path)
    except InputError as error:
        yield str(error)


def _template_problems(
    config: Config, texts: UsableTexts | None, key: str, source: RewardSource, tokenizer: Any
) -> Iterator[str]:
    """Yield what keeps a classifier's chat template from being used."""
    from ppo_ray.reward.classifier import read_template  # loads torch

    if source.chat_template == "none":
        return
    option = f"{key.removesuffix('.path')}.chat_template"
    try:
        read_template(source.chat_template, tokenizer, str(source.path))
    except InputError as error:
        yield str(error).replace("reward.chat_template", option, 1)
    if texts and not has_template(config.prompts, texts.are_chats):
        yield (
            f"{option}={source.chat_template}: makes a text of messages, and the prompts are plain texts; set "
            "prompts.chat_template=tokenizer"
        )


def _length_problems(config: Config, notes: list[str], path: str, classifier: Any, tokenizer: Any) -> Iterator[str]:
    """Compare the longest text with what the classifier takes; its tokens may be somewhat shorter or longer."""
    limit, longest = token_limit(classifier, tokenizer), config.rollout.max_response_tokens
    if limit is None:
        return
    room = limit - tokenizer.num_special_tokens_to_add()
    whole = min(config.prompts.max_tokens + longest, config.max_context)
    if longest > room:
        yield (
            f"rollout.max_response_tokens={longest}: {path} takes texts of at most {limit} tokens and would not see a "
            f"whole response; set it to {room} or less"
        )
    elif whole > room:
        notes.append(
            f"{path} takes texts of at most {limit} tokens, and prompt and response may have {whole}: of such a text "
            "it sees the end; score/truncated_rate is their share"
        )
