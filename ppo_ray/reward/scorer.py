"""All that scores of a config: its one reward, or its parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ppo_ray.config import Config, RewardConfig, RewardSource
from ppo_ray.errors import InputError
from ppo_ray.reward.function import RewardFunction
from ppo_ray.reward.http import RewardServer
from ppo_ray.reward.judge import Judge, StartJudge


class Scorer:
    """The classifiers, functions, servers and judges of a config."""

    def __init__(self, config: Config, start_judge: StartJudge | None = None) -> None:
        """Load the classifiers and judges, import the functions, read the servers' tokens.

        Args:
            config: names them.
            start_judge: loads a judge; None: there is none.

        Raises:
            InputError: one of them cannot be used.
        """
        kept = config.prompts.kept_names
        self._scorers = [_make_scorer(source, config.reward, kept, start_judge) for _, source in config.reward.sources]
        self.truncated: list[bool] | None = None
        """Whether a classifier saw only the end of each text of the last `score`; None: no classifier scores."""
        self.failure: str | None = None
        """Why a text of the last `score` has no score; None: every one has one."""

    @property
    def arguments(self) -> set[str]:
        """Names of what functions and servers are given beside prompts and responses, where there is such."""
        return {name for scorer in self._scorers for name in getattr(scorer, "arguments", None) or ()}

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        read: Callable[[Sequence[str]], Mapping[str, Sequence[Any]]],
    ) -> list[list[float | None]]:
        """Return each part's scores, one or None per response.

        Args:
            prompts: texts.
            responses: texts.
            read: returns what else there is of each response, for the names that a function or server takes.

        Raises:
            InputError: a function does not return a number or None per response, or a column cannot be sent.
        """
        parts: list[list[float | None]] = []
        self.truncated, self.failure = None, None
        for scorer in self._scorers:
            if isinstance(scorer, RewardFunction | RewardServer):
                parts.append(scorer.score(prompts, responses, read(scorer.arguments or ())))
            elif isinstance(scorer, Judge):
                parts.append(scorer.score(prompts, responses, read((*scorer.arguments, "messages"))))
            else:
                texts: list[Any] = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
                if scorer.arguments:  # it has a chat template
                    chats = zip(read(scorer.arguments)["messages"], responses, strict=True)
                    texts = [[*messages, {"role": "assistant", "content": answer}] for messages, answer in chats]
                parts.append(scorer.score(texts))
                before = self.truncated or [False] * len(prompts)
                self.truncated = [any(pair) for pair in zip(before, scorer.truncated, strict=True)]
            self.failure = scorer.failure or self.failure
        return parts


def _make_scorer(
    source: RewardSource, reward: RewardConfig, kept: Sequence[str], start_judge: StartJudge | None
) -> Any:
    if source.function is not None:
        return RewardFunction(source.function, kept, max_concurrent=reward.max_concurrent, timeout_s=reward.timeout_s)
    if source.url is not None:
        return RewardServer(source, kept, retries=reward.retries, timeout_s=reward.timeout_s)
    if source.judge is not None:
        from ppo_ray.models.loading import load_tokenizer  # loads torch

        if start_judge is None:
            raise InputError("reward.judge: there is nothing here that starts a judge")
        tokenizer = load_tokenizer(source.judge.path, source.judge.trust)
        return Judge(source.judge, kept, tokenizer, start_judge(source.judge))
    from ppo_ray.reward.classifier import Classifier  # loads torch

    return Classifier(
        str(source.path),
        label=source.label,
        transform=source.transform,
        dtype=source.dtype,
        batch_size=source.batch_size,
        batch_tokens=source.batch_tokens,
        chat_template=source.chat_template,
        trust=source.trust,
    )
