"""Text to token ids with a tokenizer.json alone, for whoever needs neither special tokens nor a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dlo_export.checkpoints.errors import CheckpointError


def load_encoder(folder: Path) -> Callable[[str], Sequence[int]]:
    """Opens the tokenizer.json of a folder.

    Returns:
        Token ids of a text, without special tokens.

    Raises:
        CheckpointError: There is none, or the `tokenizers` package cannot read it.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no tokenizer.json", hint="save it there with transformers")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as err:  # tokenizers raises nothing more precise
        raise CheckpointError(f"{file}: is no tokenizer ({err})", hint="save it again with transformers") from err
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
