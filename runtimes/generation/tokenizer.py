"""Text to tokens and back, with the tokenizer that lies in an artefact's folder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import dlo_export.modeling.configuration  # noqa: F401 - makes the configuration of routed models known to AutoTokenizer
from dlo_export.runtimes.errors import RuntimeInputError

_REPLACEMENT = "\ufffd"  # what decoders make of bytes that are not, or not yet, a character


class TokenizerError(RuntimeInputError):
    """A folder has no tokenizer, or one that cannot be read."""


class Tokenizer:
    """The tokenizer of a model's folder.

    Args:
        folder: Artefact or checkpoint; nothing is downloaded, no code of the folder runs.
        origin: What its files were copied from, to be named in its place.

    Raises:
        TokenizerError: There is none, or transformers cannot read it.
    """

    def __init__(self, folder: str | Path, *, origin: Path | None = None) -> None:
        files = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if not any((Path(folder) / file).is_file() for file in files):
            raise TokenizerError(
                f"{origin or folder}: has no tokenizer, expected one of {', '.join(files)}",
                hint="copy the tokenizer files of the checkpoint the model was made from",
            )
        try:
            # Of transformers, which does not publish types.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as err:  # tokenizers raises bare Exception, transformers whatever a bad file leads to
            hint = "copy the checkpoint's tokenizer files into the folder"
            if "trust_remote_code" in str(err):
                hint = "no code of a folder is run: remove auto_map from its tokenizer_config.json"
            raise TokenizerError(
                f"{origin or folder}: transformers cannot read the tokenizer: {err}", hint=hint
            ) from err

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained on chats in a known form."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to continue, with the special tokens the model starts with, without those that end texts.

        Raises:
            TokenizerError: The text is not Unicode: it holds half a surrogate pair, or bytes that are not UTF-8.
        """
        _check_unicode(text)
        # Not verbose: whether a text is too long for the model is for others to say.
        encoded = self._tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if self._tokenizer.is_fast:  # others guess which tokens they have added
            written = [place for place, is_added in enumerate(encoded["special_tokens_mask"]) if not is_added]
            ids = ids[: written[-1] + 1] if written else []
        bos = self._tokenizer.bos_token_id
        return ids or ([bos] if bos is not None else [])

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a whole text with all special tokens, and how much of it each ends behind, in characters.

        Raises:
            TokenizerError: The text is not Unicode, or the tokenizer does not tell where in a text its tokens are.
        """
        _check_unicode(text)
        if not self._tokenizer.is_fast:
            raise TokenizerError(
                "tokenizer: does not tell where in a text its tokens are",
                hint="save it as tokenizer.json with transformers",
            )
        encoded = self._tokenizer(text, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        # A token that the tokenizer put there lies nowhere in the text, at (0, 0): what is in front of it stays read.
        return encoded["input_ids"], [*itertools.accumulate((end for _, end in encoded["offset_mapping"]), max)]

    @property
    def start_token(self) -> int | None:
        """What a text without context stands behind: the token that starts texts, or else the one that ends them."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        token: int | None = eos if bos is None else bos
        return token

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to where the model answers.

        Args:
            messages: Dicts of `role` ("system", "user", "assistant") and `content`.

        Raises:
            TokenizerError: There is no chat template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise TokenizerError(
                "tokenizer: has no chat template, so a chat cannot be turned into tokens",
                hint="give the prompt as plain text",
            )
        for message in messages:
            _check_unicode(message["content"])
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as err:  # whatever a template of a checkpoint raises
            raise TokenizerError(
                f"tokenizer: the chat template failed: {err}", hint="the model may not take such messages; try --raw"
            ) from err
        # The template has written the special tokens already.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def stream(self) -> TextStream:
        """Starts turning one sequence's tokens into text as they come."""
        return TextStream(self)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise TokenizerError(
            f"prompt: character {err.start} is {text[err.start]!r}, which is not Unicode text",
            hint="give the prompt as UTF-8",
        ) from err


class TextStream:
    """Turns a sequence's tokens into text as they come, never splitting a character.

    A token may hold part of a character's UTF-8 bytes, and how it reads may depend on the token before it (whether it
    starts with a space): text is decoded from a few tokens back, and held until it no longer ends within a character.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text is out already
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now, possibly none."""
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Returns what is held back: bytes that never became a character show as U+FFFD."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]
