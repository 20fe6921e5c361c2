"""Whether a tokenizer.json is one of the model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_file import read_json


def check_vocabulary(file: Path, vocab_size: int) -> None:
    """Refuses a tokenizer with tokens that the model has no embedding for.

    One behind the last is let through: it is common that a padding token was added to the tokenizer, and no row to the
    embedding. Fewer tokens are common too: embeddings are padded to round sizes.

    Args:
        file: tokenizer.json, in the form of the `tokenizers` package.
        vocab_size: Of the model.

    Raises:
        CheckpointError: The file is damaged, or has larger ids.
    """
    largest = max(_token_ids(read_json(file, CheckpointError)), default=-1)
    if largest > vocab_size:
        raise CheckpointError(
            f"{file}: has tokens up to id {largest}, the model has vocab_size {vocab_size}",
            hint="the tokenizer belongs to another model: put this model's beside its weights",
        )


def _token_ids(tokenizer: dict[str, Any]) -> Iterator[int]:
    """Ids of the model's vocabulary, in any of its forms, and of the tokens added to it."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from (token for token in vocabulary.values() if type(token) is int)
    elif isinstance(vocabulary, list):  # Unigram's: pairs of a piece and its score
        yield len(vocabulary) - 1
    if isinstance(added, list):
        yield from (entry["id"] for entry in added if isinstance(entry, dict) and type(entry.get("id")) is int)
