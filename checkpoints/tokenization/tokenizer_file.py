"""Reads tokenizer.json with the `tokenizers` library, whose errors are bare exceptions that name no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from dlo_export.checkpoints.errors import InputError

_HINT = "copy the tokenizer.json of the model it was made from"


def text_encoder(path: Path) -> Callable[[str], list[int]]:
    """Opens a tokenizer.json.

    Args:
        path: The file.

    Returns:
        What makes token ids of a text, without special tokens; it raises InputError where the tokenizer cannot.

    Raises:
        InputError: The file is missing or no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # bare ones
        raise InputError(f"{path}: is no tokenizer that can be read: {err}", hint=_HINT) from err

    def encode(text: str) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as err:
            raise InputError(f"{path}: cannot tokenize: {err}", hint=_HINT) from err
        return ids

    return encode
