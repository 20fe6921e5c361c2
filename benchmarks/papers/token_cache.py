"""Tokens of text that was turned into tokens before: of a large text that takes longer than training on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.modeling.training.documents import TokenDocument


def cached_documents(
    folder: Path, text: Path, tokenizer: Any, length: int, make: Callable[[], list[TokenDocument]]
) -> list[TokenDocument]:
    """The documents of a text, made where they are not kept yet.

    Args:
        folder: Where they are kept, under a name that depends on everything they depend on.
        text: The file.
        tokenizer: transformers', with its chat template.
        length: Tokens of the longest document.
        make: Makes them.
    """
    digest = hashlib.sha256(text.read_bytes())
    digest.update(f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template} {length}".encode())
    file = folder / f"{text.stem}-{digest.hexdigest()[:16]}.npz"
    if not file.exists():
        _save(file, make())
    return _read(file)


def _save(file: Path, documents: list[TokenDocument]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            lengths=np.array([len(document.tokens) for document in documents], np.int32),
            tokens=np.concatenate([document.tokens for document in documents]),
            learned=np.packbits(np.concatenate([document.learned for document in documents])),
            origins=np.array([document.origin for document in documents]),
        )
    os.replace(partial, file)


def _read(file: Path) -> list[TokenDocument]:
    with np.load(file) as stored:
        lengths, tokens, origins = stored["lengths"], stored["tokens"], stored["origins"].tolist()
        learned = np.unpackbits(stored["learned"], count=len(tokens)).astype(bool)
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return [
        TokenDocument(origin, tokens[start:end], learned[start:end])
        for origin, start, end in zip(origins, starts, ends, strict=True)
    ]
