"""A policy's tokens: which of them end a response, and where the text of a prompt ends and that of its response begins.

Loads no torch by itself.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_ray.config import Config, JudgeConfig, ModelConfig
from ppo_ray.errors import QUOTED, InputError, first_line

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character are decoded to
_MOST_BYTES = 4  # of a character in UTF-8
_SHOWN = 10  # tokens that a line names


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a response."""

    ids: tuple[int, ...]
    """Any of them ends a response and is its last token; ascending, all in the model's vocabulary."""
    ignored: tuple[int, ...] = ()
    """Ids that are named too, but that the model cannot sample: they are not in its vocabulary."""

    def describe(self, tokenizer: Any) -> str:
        """Say which tokens end a response, as a run prints it when it starts."""
        shown = [f"{token} {tokenizer.decode([token])!r}" for token in self.ids[:_SHOWN]]
        shown += [f"{len(self.ids) - _SHOWN} others"] if len(self.ids) > _SHOWN else []
        ignored = (
            f"; not in the model's vocabulary: {', '.join(map(str, self.ignored[:_SHOWN]))}" if self.ignored else ""
        )
        return f"a response ends with: {', '.join(shown) or 'its last token, at its limit'}{ignored}"


def find_end_tokens(eos_token_id: int | None, declared: Any, vocab_size: int) -> EndTokens:
    """Join a tokenizer's end of sequence and what a model declares.

    Models that chat end their turn by another token than their tokenizer's end of sequence, and say so in
    `generation_config.json`.

    Args:
        eos_token_id: the tokenizer's; None: it has none.
        declared: `eos_token_id` of the model's generation config: an id, a list of ids, or None.
        vocab_size: of the model.

    Raises:
        ValueError: `declared` is something else.
    """
    listed = list(declared) if isinstance(declared, Iterable) and not isinstance(declared, str) else [declared]
    if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in listed):
        raise ValueError(f"eos_token_id={str(declared)[:QUOTED]!r} is neither a token id nor a list of them")
    named = {token for token in (eos_token_id, *listed) if token is not None}
    known = {token for token in named if 0 <= token < vocab_size}
    return EndTokens(tuple(sorted(known)), tuple(sorted(named - known)))


def read_end_tokens(config: Config, tokenizer: Any) -> EndTokens:
    """Return what ends a response of a run: one set for engines, metrics and penalties.

    It is the tokenizer's end of sequence and each `eos_token_id` of `generation_config.json`; a model without that file
    is asked for the `eos_token_id` of its `config.json`. transformers' `generate` and vLLM go by the same files. The
    tokens of `rollout.stop_token_ids` are added.

    Args:
        config: of the run.
        tokenizer: the policy's.

    Raises:
        InputError: nothing can end a response, and `rollout.stop_at_eos` is true; a token of
            `rollout.stop_token_ids` is not in the vocabulary; or a file cannot be read.
    """
    where, added = f"model.path={config.model.path}", config.rollout.stop_token_ids
    if not config.rollout.stop_at_eos and not added:
        return EndTokens(())
    try:
        declared, vocab_size = _read_declaration(config.model)
        at_eos = config.rollout.stop_at_eos
        ends = find_end_tokens(tokenizer.eos_token_id, declared, vocab_size) if at_eos else EndTokens(())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: what ends a response cannot be read: {first_line(error)}") from error
    if unknown := [token for token in added if not 0 <= token < vocab_size]:
        raise InputError(
            f"rollout.stop_token_ids={list(added)}: {unknown} are not in the vocabulary of {config.model.path}, which "
            f"has the ids 0 to {vocab_size - 1}"
        )
    ends = EndTokens(tuple(sorted({*ends.ids, *added})), ends.ignored)
    if not ends.ids:
        why = "neither its tokenizer nor its generation_config.json names an end-of-sequence token"
        if ends.ignored:
            why = f"its end-of-sequence tokens {list(ends.ignored)} are not in its vocabulary of {vocab_size}"
        raise InputError(
            f"{where}: {why}, so nothing can end a response; name one (tokenizer.eos_token), or set "
            "rollout.stop_at_eos=false: every response then has its full length"
        )
    return ends


def read_model_ends(model: ModelConfig | JudgeConfig, tokenizer: Any) -> EndTokens:
    """Return what ends an answer of a model by its own files; see `read_end_tokens`.

    Raises:
        InputError: nothing does, or a file cannot be read.
    """
    try:
        ends = find_end_tokens(tokenizer.eos_token_id, *_read_declaration(model))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"path={model.path}: what ends an answer cannot be read: {first_line(error)}") from error
    if not ends.ids:
        raise InputError(f"path={model.path}: neither its tokenizer nor its files name a token that ends an answer")
    return ends


def _read_declaration(model: ModelConfig | JudgeConfig) -> tuple[Any, int]:
    """Return `eos_token_id` as the model's files declare it, and the size of the vocabulary."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    trust = model.trust
    whole = AutoConfig.from_pretrained(model.path, trust_remote_code=trust.remote_code, **trust.place)
    decoder = whole.get_text_config(decoder=True)
    path = cached_file(
        model.path,
        "generation_config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **trust.place,
    )
    if path is None:
        own = getattr(whole, "eos_token_id", None)
        return getattr(decoder, "eos_token_id", None) if own is None else own, int(decoder.vocab_size)
    declared = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(declared, dict):
        raise ValueError("generation_config.json is not a JSON object")
    return declared.get("eos_token_id"), int(decoder.vocab_size)


def decode_pair(tokenizer: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[str, str]:
    """Return the texts of a prompt and of its response, special tokens left out.

    The prompt's text depends on the prompt alone. Where a prompt ends within a character, its text ends before, and the
    character is the response's. Both are decoded together, for what a token adds depends on those before it.
    """
    prompt, num_whole = _decode_whole(tokenizer, prompt_ids)
    everything = [*prompt_ids, *response_ids]
    text = _decode(tokenizer, everything)
    if text.startswith(prompt):
        return prompt, text[len(prompt) :]
    apart = {"clean_up_tokenization_spaces": False}  # cleaning up may join what was apart in the prompt
    begin, text = _decode_whole(tokenizer, prompt_ids, **apart)[0], _decode(tokenizer, everything, **apart)
    if text.startswith(begin):
        return prompt, text[len(begin) :]
    # Bytes of the response spoil those of the prompt where a tokenizer decodes a row of bytes as one.
    return prompt, _decode(tokenizer, everything[num_whole:])


def _decode_whole(tokenizer: Any, ids: Sequence[int], **options: Any) -> tuple[str, int]:
    """Decode all whole characters; return their text, and how many ids, if any cut, it needs.

    Bytes that are cut off show as replacement characters at the end. A tokenizer of bytes may make one of each byte of
    the whole row of bytes, the whole characters in it included; without the last ids it does not.
    """
    text = _decode(tokenizer, ids, **options)
    if not text.endswith(_REPLACEMENT):
        return text, len(ids)
    special = set(tokenizer.all_special_ids)
    best = ("", 0)
    for num_ids in range(len(ids), max(len(ids) - _MOST_BYTES, -1), -1):
        kept = list(ids[:num_ids])
        text = _decode(tokenizer, kept, **options)
        plain = [token for token in kept if token not in special]
        while text.endswith(_REPLACEMENT) and not _spells(tokenizer, plain, text):
            text = text[: -len(_REPLACEMENT)]
        if len(text) > len(best[0]):
            best = (text, num_ids)
    return best


def _spells(tokenizer: Any, ids: list[int], text: str) -> bool:
    """Say whether ids begin with those of a text: then the replacement characters in it are the text's own."""
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[: len(own)] == list(own)


def _decode(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, **options))
