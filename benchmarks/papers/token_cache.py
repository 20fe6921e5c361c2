"""Tokens of text that was turned into tokens before: of a large text that takes longer than training on it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.modeling.training.documents import TokenDocument

_SAMPLE = 20_000  # characters


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
    file = folder / f"{text.stem}-{_identity(text.read_text(encoding='utf-8'), tokenizer, length)}.npz"
    if not file.exists():
        _save(file, make())
    return _read(file)


def _identity(text: str, tokenizer: Any, length: int) -> str:
    """Of what tokens depend on. A tokenizer's own file is written differently by each version of its library."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    sample = tokenizer(text[:_SAMPLE], add_special_tokens=False, verbose=False)["input_ids"]
    parts = (text, json.dumps([vocabulary, sample, tokenizer.chat_template, length]))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _save(file: Path, documents: list[TokenDocument]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".partial-{os.getpid()}")  # several processes may make the same
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
