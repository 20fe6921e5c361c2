"""Text to token ids with a tokenizer.json alone, for whoever needs neither special tokens nor a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dlo_export.checkpoints.errors import CheckpointError


def load_encoder(folder: Path, model: Path | None = None) -> Callable[[str], Sequence[int]]:
    """Opens the tokenizer.json of a folder.

    Args:
        folder: Where it lies.
        model: Whose it is, for messages; the folder's unless given.

    Returns:
        Token ids of a text, without special tokens.

    Raises:
        CheckpointError: There is none, or the `tokenizers` package cannot read it.
    """
    file, model = folder / "tokenizer.json", model or folder
    if not file.is_file():
        hint = "save the tokenizer there with transformers"
        if model.is_file():
            hint = "give a folder that has one: docs/checkpoints.md lists the tokenizers that are read of a GGUF file"
        raise CheckpointError(f"{model}: has no tokenizer.json", hint=hint)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as err:  # tokenizers raises nothing more precise
        raise CheckpointError(
            f"{model}: its tokenizer.json is no tokenizer ({err})", hint="save the tokenizer again with transformers"
        ) from err
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
