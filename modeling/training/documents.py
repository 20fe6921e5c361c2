"""Turns chats and texts into tokens, and says which of them are to be learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

import dlo_export.modeling.configuration  # noqa: F401 - makes the configuration of routed models known to AutoTokenizer
from dlo_export.modeling.training.errors import TrainingDataError
from dlo_export.modeling.training.records import Message, Record

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] }}{{ eos_token }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""Of plain words, for tokenizers that have none of their own and so no tokens for the roles."""


@dataclass(frozen=True)
class TokenDocument:
    """A document as the model reads it.

    Attributes:
        origin: For errors.
        tokens: int32 [length].
        learned: bool [length]: the tokens that the loss counts.
    """

    origin: str
    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class TokenizedData:
    """Documents, and how many were cut or left out because they were too long."""

    documents: list[TokenDocument]
    shortened: int
    skipped: int


def tokenize_records(records: Sequence[Record], tokenizer: Any, *, length: int, long_chats: str) -> TokenizedData:
    """Turns records into documents of at most a number of tokens.

    Of a chat the assistants' turns are learned, with what ends them; of a text, everything. Long texts are cut into
    pieces.

    Args:
        records: As they were read.
        tokenizer: transformers', with a chat template.
        length: Tokens of the longest document.
        long_chats: ``error``, ``truncate`` or ``skip``.

    Raises:
        TrainingDataError: The chat template refuses a chat or hides its turns; a chat is too long; nothing is left.
    """
    documents: list[TokenDocument] = []
    too_long: list[TokenDocument] = []
    skipped = 0
    for record in records:
        if not record.messages:
            documents += _text_pieces(record, tokenizer, length)
            continue
        chat = _chat_document(record, tokenizer)
        if len(chat.tokens) <= length:
            documents.append(chat)
            continue
        too_long.append(chat)
        cut = TokenDocument(chat.origin, chat.tokens[:length], chat.learned[:length])
        if long_chats == "truncate" and cut.learned[1:].any():
            documents.append(cut)
        else:
            skipped += 1
    if too_long and long_chats == "error":
        raise TrainingDataError(
            f"{too_long[0].origin}: the chat has {len(too_long[0].tokens)} tokens, a sequence {length}"
            + (f"; so have {len(too_long) - 1} more chats" if len(too_long) > 1 else ""),
            hint="give --sequence more tokens, or say --long-chats truncate or skip",
        )
    if not documents:
        raise TrainingDataError(
            f"training data: nothing is left: {skipped} chats are longer than a sequence of {length} tokens, "
            "texts of one token teach nothing",
            hint="give more data, or --sequence more tokens",
        )
    return TokenizedData(documents, len(too_long) - skipped, skipped)


def _text_pieces(record: Record, tokenizer: Any, length: int) -> Iterator[TokenDocument]:
    ids = list(tokenizer(record.text, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    for start in range(0, len(ids), length):
        tokens = np.asarray(ids[start : start + length], np.int32)
        if len(tokens) > 1:  # nothing foretells the first one
            yield TokenDocument(record.origin, tokens, np.ones(len(tokens), bool))


def _chat_document(record: Record, tokenizer: Any) -> TokenDocument:
    text, spans = _rendered(record, tokenizer)
    # The template has written the special tokens already.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.asarray(encoded["input_ids"], np.int32)
    starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    learned = np.zeros(len(tokens), bool)
    for first, last in spans:
        learned |= (starts >= first) & (starts < last) & (ends > starts)
    if not learned[1:].any():
        raise TrainingDataError(
            f"{record.origin}: the chat template leaves nothing of the assistant's turns",
            hint="is it the template the model is used with?",
        )
    return TokenDocument(record.origin, tokens, learned)


def _rendered(record: Record, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and where in it the assistants' turns are.

    A turn is what the text of the chat up to it lacks: templates say nowhere where turns begin and end.
    """
    full = _render(record, record.messages, tokenizer, prompt=False)
    spans = []
    for position, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        before = _render(record, record.messages[:position], tokenizer, prompt=True) if position else ""
        through = _render(record, record.messages[: position + 1], tokenizer, prompt=False)
        if not (full.startswith(through) and through.startswith(before)):
            raise TrainingDataError(
                f"{record.origin}: the chat template writes messages[{position}] differently when others follow, "
                "so its tokens cannot be told from theirs",
                hint="save the tokenizer with a template that appends each turn to the ones before",
            )
        spans.append((len(before), len(through)))
    return full, spans


def _render(record: Record, messages: Sequence[Message], tokenizer: Any, *, prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as err:  # whatever a template of a checkpoint raises
        raise TrainingDataError(
            f"{record.origin}: the chat template refuses the chat: {err}",
            hint="bring the turns into the order the model knows, or change the template",
        ) from err
    return text


def open_tokenizer(folder: Path, shown: Path) -> tuple[Any, bool]:
    """Opens the tokenizer of a checkpoint for training.

    Args:
        folder: Holds its files; nothing is downloaded, no code of the folder runs.
        shown: What errors call the place.

    Returns:
        transformers' tokenizer, and whether it was given `DEFAULT_CHAT_TEMPLATE` for want of one.

    Raises:
        TrainingDataError: There is none, or it does not tell where in a text its tokens are.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as err:  # tokenizers raises bare Exception, transformers whatever a bad file leads to
        raise TrainingDataError(
            f"{shown}: transformers cannot read its tokenizer: {err}",
            hint="save the tokenizer beside the checkpoint with transformers",
        ) from err
    if not tokenizer.is_fast:
        raise TrainingDataError(
            f"{shown}: has no tokenizer.json, so nothing tells which tokens are the assistant's",
            hint="save the tokenizer in its fast form with transformers",
        )
    lacks_template = not tokenizer.chat_template
    if lacks_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer, lacks_template
