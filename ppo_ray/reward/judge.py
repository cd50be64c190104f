"""A judge: a language model that is asked about each response, and whose verdict is the score."""

import json
import logging
import math
import re
import string
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_ray.config import JudgeConfig
from ppo_ray.errors import NUM_LOGGED, QUOTED, InputError, first_line

_LOG = logging.getLogger(__name__)

Ask = Callable[[Sequence[tuple[int, ...]]], list[tuple[int, ...]]]
"""Returns the tokens that the judge answers to the tokens of each question."""
StartJudge = Callable[[JudgeConfig], Ask]
"""Loads the judge."""


class Question:
    """The question that is asked about each response, with the names of what it holds."""

    def __init__(self, path: str, columns: Collection[str]) -> None:
        """Read the file.

        Args:
            path: of the file.
            columns: names of the kept columns.

        Raises:
            InputError: it cannot be read, or a name in braces stands for nothing.
        """
        where, known = f"prompt={path}", ["prompt", "response", *columns]
        try:
            fields = list(string.Formatter().parse(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeError) as error:
            raise InputError(f"{where}: cannot be read: {error}") from error
        except ValueError as error:
            raise InputError(f"{where}: {error}; write {{{{ and }}}} for braces") from error
        self._fields = [(literal, name) for literal, name, _, _ in fields]
        self.names = list(dict.fromkeys(name for _, name in self._fields if name is not None))
        """What is filled in."""
        if any(form or conversion for _, _, form, conversion in fields):
            raise InputError(f"{where}: a name in braces stands alone, without : or !; write {{{{ and }}}} for braces")
        if unknown := [name for name in self.names if name not in known]:
            raise InputError(
                f"{where}: nothing is known for {{{unknown[0][:QUOTED]}}}; there are {', '.join(known)}, and the "
                "columns that prompts.keep names"
            )
        if "response" not in self.names:
            raise InputError(f"{where}: does not hold {{response}}")

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the question about one response; what is no text is written as JSON."""
        shown = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            for name, value in values.items()
        }
        return "".join(literal + ("" if name is None else shown[name]) for literal, name in self._fields)


class Judge:
    """A judge that scores batches; an answer without a verdict leaves its response without a score."""

    def __init__(self, config: JudgeConfig, columns: Collection[str], tokenizer: Any, ask: Ask) -> None:
        """Read the question.

        Args:
            config: of the judge.
            columns: names of the kept columns.
            tokenizer: the judge's, of transformers.
            ask: the judge.

        Raises:
            InputError: the question cannot be used.
        """
        self._config, self._tokenizer, self._ask = config, tokenizer, ask
        self._question, self._pattern = Question(config.prompt, columns), re.compile(config.pattern)
        self.arguments = tuple(name for name in self._question.names if name in columns)
        """Names of what it takes beside prompts and responses."""
        self.failure: str | None = None
        """Why the first response without a score in the last `score` has none; None: every one has one."""

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] = types.MappingProxyType({}),
    ) -> list[float | None]:
        """Ask about each response; None where there is no verdict.

        Args:
            prompts: texts.
            responses: texts.
            columns: what else there is of each response, a sequence per name. A conversation in `messages` stands for
                the prompt, each message behind its role.
        """
        scores: list[float | None] = [None] * len(prompts)
        failures: dict[int, str] = {}
        asked: dict[int, tuple[int, ...]] = {}
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            values = {name: items[row] for name, items in columns.items()}
            if "messages" in columns:
                turns = (f"{message['role']}: {message.get('content', '')}" for message in columns["messages"][row])
                prompt = "\n".join(turns)
            try:
                asked[row] = self._encode(self._question.fill({**values, "prompt": prompt, "response": response}))
            except ValueError as error:
                failures[row] = str(error)
        for row, answer in zip(asked, self._ask(list(asked.values())) if asked else [], strict=True):
            text = self._tokenizer.decode(list(answer), skip_special_tokens=True)
            scores[row] = self._read(text)
            if scores[row] is None:
                failures[row] = f"there is no verdict in the judge's answer {text[-QUOTED:]!r}"
        shown = [
            f"the response {responses[row][:QUOTED]!r} has no score: {failures[row]}"
            for row in sorted(failures)[:NUM_LOGGED]
        ]
        self.failure = shown[0] if shown else None
        for message in shown:
            _LOG.warning(message)
        return scores

    def _encode(self, question: str) -> tuple[int, ...]:
        """Return the tokens of a question, as a user's message where the judge has a chat template.

        Raises:
            ValueError: it is too long.
        """
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        else:
            encoded = self._tokenizer(question, verbose=False)
        room = self._config.max_context - self._config.max_tokens
        if len(ids := tuple(encoded["input_ids"])) > room:
            raise ValueError(f"its question has {len(ids)} tokens, and max_context - max_tokens = {room}")
        return ids

    def _read(self, answer: str) -> float | None:
        """Return the score of the last verdict in an answer."""
        verdicts = [match.group(1) for match in self._pattern.finditer(answer)]
        if not verdicts or verdicts[-1] is None:
            return None
        if self._config.scores:
            return self._config.scores.get(verdicts[-1])
        try:
            number = float(verdicts[-1])
        except ValueError:
            return None
        return number if math.isfinite(number) else None


def describe_template_failure(tokenizer: Any) -> str | None:
    """Say why a judge's chat template takes no user's message; None: it does, or there is none."""
    try:
        if tokenizer.chat_template:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)
    except Exception as error:  # Jinja's errors, and whatever a template raises by itself
        return f"its chat template refuses a user's message: {first_line(error)}"
    return None
