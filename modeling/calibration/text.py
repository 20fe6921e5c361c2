"""The text routers are fitted on and measured on: different documents, cut into sequences of tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.text_files import files_below, read_text_file

Encode = Callable[[str], Sequence[int]]
"""A tokenizer: text to token ids, without special tokens."""


class CalibrationTextError(InputError):
    """There is no text, too little of it, or it cannot be read."""


@dataclass(frozen=True)
class Document:
    """A text and where it is from."""

    name: str
    text: str


@dataclass(frozen=True)
class CalibrationText:
    """Token sequences of two disjoint sets of documents.

    Attributes:
        calibration: int64 [sequences, length], what routers are fitted on.
        evaluation: int64 [sequences, length], what they are measured on.
        calibration_documents: Names of the documents behind the first.
        evaluation_documents: Names of the documents behind the second.
    """

    calibration: torch.Tensor
    evaluation: torch.Tensor
    calibration_documents: tuple[str, ...]
    evaluation_documents: tuple[str, ...]

    def to(self, device: torch.device) -> CalibrationText:
        """The same text there."""
        return dataclasses.replace(self, calibration=self.calibration.to(device), evaluation=self.evaluation.to(device))


def read_documents(path: Path | None = None) -> tuple[Document, ...]:
    """Reads every .txt file of a folder, or one file; without a path, the language reference Python comes with.

    A single file is cut at a paragraph, two thirds in, so that calibration and evaluation still get different text.

    Raises:
        CalibrationTextError: Nothing to read there, or it is not UTF-8.
    """
    if path is None:
        # 79 topics, 465 kB: real prose on every machine, no download.
        from pydoc_data.topics import topics  # noqa: PLC0415 (a megabyte nobody else needs)

        return tuple(Document(name, topics[name]) for name in sorted(topics))
    if path.is_dir():
        files = files_below(path, (".txt",))
        if not files:
            raise CalibrationTextError(f"{path}: holds no .txt files", hint="give one file, or a folder of .txt files")
        documents = tuple(
            Document(str(file.relative_to(path)), read_text_file(file, CalibrationTextError)) for file in files
        )
        return documents if len(documents) > 1 else _halves(documents[0])
    return _halves(Document(path.name, read_text_file(path, CalibrationTextError)))


def calibration_text(
    documents: Sequence[Document],
    encode: Encode,
    *,
    calibration_tokens: int = 16_384,
    evaluation_tokens: int = 8_192,
    sequence_length: int = 512,
    seed: int = 0,
    evaluation_seed: int = 0,
) -> CalibrationText:
    """Draws documents for evaluation, then others for calibration, and cuts each set into sequences.

    Args:
        documents: In any order.
        encode: The model's tokenizer.
        calibration_tokens: Rounded down to whole sequences.
        evaluation_tokens: Likewise.
        sequence_length: Tokens per sequence.
        seed: Of the choice of calibration documents.
        evaluation_seed: Of the choice of evaluation documents; the same whatever is calibrated on.

    Raises:
        CalibrationTextError: The documents have too few tokens.
    """
    remaining = list(documents)
    random.Random(evaluation_seed).shuffle(remaining)
    evaluation, evaluated = _draw(remaining, encode, evaluation_tokens, sequence_length, "evaluation")
    random.Random(seed).shuffle(remaining)
    calibration, calibrated = _draw(remaining, encode, calibration_tokens, sequence_length, "calibration")
    return CalibrationText(calibration, evaluation, calibrated, evaluated)


def evaluation_sequences(
    documents: Sequence[Document], encode: Encode, tokens: int, *, origin: str, sequence_length: int = 512
) -> torch.Tensor:
    """What `calibration_text` draws for evaluation, where nothing is calibrated: int64 [sequences, length].

    Args:
        documents: In any order.
        encode: The model's tokenizer.
        tokens: Rounded down to whole sequences.
        origin: Of the documents, for messages.
        sequence_length: Tokens per sequence.

    Raises:
        CalibrationTextError: The documents have too few tokens.
    """
    remaining = list(documents)
    random.Random(0).shuffle(remaining)
    return _draw(remaining, encode, tokens, sequence_length, origin, "give more text, or ask for fewer tokens")[0]


def _draw(
    remaining: list[Document],
    encode: Encode,
    tokens: int,
    length: int,
    purpose: str,
    hint: str = "give more text, or ask for fewer tokens; no document serves both purposes",
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Takes documents off the list until there are enough tokens."""
    wanted = tokens // length * length
    if wanted == 0:
        raise CalibrationTextError(
            f"{purpose}: {tokens} tokens make no sequence of {length}", hint="ask for more tokens or shorter sequences"
        )
    ids: list[int] = []
    names = []
    while len(ids) < wanted:
        if not remaining:
            raise CalibrationTextError(
                f"{purpose}: the documents left have {len(ids)} tokens, expected {wanted}", hint=hint
            )
        document = remaining.pop()
        ids += encode(document.text)
        names.append(document.name)
    return torch.tensor(ids[:wanted], dtype=torch.int64).reshape(-1, length), tuple(names)


def _halves(document: Document) -> tuple[Document, ...]:
    cut = document.text.find("\n\n", len(document.text) * 2 // 3)
    if cut < 0:
        cut = len(document.text) * 2 // 3
    return (
        Document(f"{document.name} (beginning)", document.text[:cut]),
        Document(f"{document.name} (end)", document.text[cut:]),
    )
