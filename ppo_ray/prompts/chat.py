"""Conversations: what a data set's messages must be, and the ids that a chat template makes of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import QUOTED, InputError, first_line

Message = dict[str, Any]
"""One message: `role`, `content`, and whatever else the template reads."""

_ANSWERER = "assistant"


def parse_messages(text: str) -> list[Message]:
    """Read a conversation that a response can be sampled for.

    Args:
        text: JSON of a list of messages. Keys whose value is null are left out, as Arrow gives every message all keys.

    Raises:
        ValueError: it is no such list, a role or content is no text, or the last word is the assistant's already.
    """
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError("is not a list of messages, each with role and content")
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"has a message without a role: {str(message)[:QUOTED]}")
        if not isinstance(message.get("content"), str | None):
            kind = type(message["content"]).__name__
            raise ValueError(f"has a message whose content is a {kind}, not text: {str(message['content'])[:QUOTED]}")
        found.append({key: value for key, value in message.items() if value is not None})
    if found[-1]["role"] == _ANSWERER:
        raise ValueError("ends with the assistant's message; a prompt ends before it")
    return found


def holds_messages(texts: Sequence[str | None]) -> bool:
    """Say whether a column holds conversations: whether its first text is JSON of messages."""
    first = next((text for text in texts if text is not None and text.strip()), "")
    if not first.lstrip().startswith("["):
        return False
    try:
        rows = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and "role" in row for row in rows)


def has_template(config: PromptsConfig, are_chats: bool) -> bool:
    """Say whether prompts are made by a chat template.

    Args:
        config: of the prompts.
        are_chats: whether the data set holds conversations.
    """
    return are_chats or config.system is not None or config.chat_template not in ("auto", "none")


class ChatTemplate:
    """The template that makes ids of conversations, and of texts as a user's only message."""

    def __init__(self, config: PromptsConfig, tokenizer: Any) -> None:
        """Take the template that `prompts.chat_template` names.

        Raises:
            InputError: there is no such file, or the tokenizer has no template.
        """
        self._tokenizer, self._system, self._arguments = tokenizer, config.system, dict(config.template_arguments)
        self._template: str | None = None
        if config.chat_template in ("auto", "tokenizer"):
            if not getattr(tokenizer, "chat_template", None):
                raise InputError(
                    f"prompts.chat_template={config.chat_template}: the policy's tokenizer has no chat template; give "
                    "a file with one: prompts.chat_template=PATH"
                )
            return
        try:
            self._template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise InputError(f"prompts.chat_template={config.chat_template}: cannot be read: {error}") from error

    def converse(self, text: str, is_chat: bool) -> list[Message]:
        """Return the conversation that a data set's text stands for, `prompts.system` in front if it has no system.

        Args:
            text: JSON of messages, or a user's words.
            is_chat: which of the two.
        """
        messages = parse_messages(text) if is_chat else [{"role": "user", "content": text}]
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        return messages

    def tokenize(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        """Return the ids of each conversation up to where the assistant's answer begins, by the template alone.

        Raises:
            InputError: the template refuses a conversation, in its own words.
        """
        try:
            encoded = self._tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                padding=False,
                truncation=False,
                **self._arguments,
            )
            return [list(ids) for ids in encoded["input_ids"]]
        except Exception as error:  # Jinja's errors, and whatever a template raises by itself
            if len(conversations) > 1:
                return [ids for messages in conversations for ids in self.tokenize([messages])]
            shown = json.dumps(list(conversations[0]), ensure_ascii=False)[:QUOTED]
            raise InputError(
                f"prompts.chat_template: the template makes no prompt of {shown}...: {first_line(error)}"
            ) from error
