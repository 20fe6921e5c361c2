"""What a model is trained and measured on: documents from files, in sequences of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.progress import Reporter
from dlo_export.modeling.training.documents import TokenizedData, tokenize_records
from dlo_export.modeling.training.errors import TrainingDataError
from dlo_export.modeling.training.packing import PackedDocuments, PackedSets
from dlo_export.modeling.training.records import Record, read_records
from dlo_export.modeling.training.settings import TrainingSettings


def packed_sets(
    data: Path,
    held_out: Path | None,
    other_text: Sequence[Path],
    settings: TrainingSettings,
    tokenizer: Any,
    vocabulary: int,
    reporter: Reporter,
) -> PackedSets:
    """The documents, in sequences.

    Args:
        data: See `TrainRequest`, here and below.
        held_out: None takes some documents out of `data`.
        other_text: To measure on, each alone.
        settings: Length of a sequence, what becomes of longer chats, the share that is held out, and the seed of that.
        tokenizer: Of transformers.
        vocabulary: Tokens that the model knows.
        reporter: Told of chats that are cut or left out.

    Raises:
        TrainingDataError: The documents are not usable, or one is all there are and some should be held out.
        InputError: The tokenizer belongs to another model.
    """
    records = read_records(data)
    if held_out is not None:
        sets: Sequence[list[Record]] = (records, read_records(held_out))
    else:
        sets = _split(records, settings, data)
    packed = []
    for chosen in (*sets, *map(read_records, other_text)):
        tokens = tokenize_records(chosen, tokenizer, length=settings.sequence, long_chats=settings.long_chats)
        if tokens.shortened or tokens.skipped:
            reporter.warn(f"{tokens.shortened} chats were cut to {settings.sequence} tokens, {tokens.skipped} left out")
        _check_vocabulary(tokens, vocabulary)
        packed.append(PackedDocuments(tokens.documents, settings.sequence))
    training, measured, *others = packed
    return PackedSets(training, measured, others=dict(zip(map(str, other_text), others, strict=True)))


def _split(records: list[Record], settings: TrainingSettings, data: Path) -> tuple[list[Record], list[Record]]:
    if len(records) < 2:
        raise TrainingDataError(
            f"{data}: holds one document, so none is left to measure on", hint="give others with --held-out"
        )
    count = min(len(records) - 1, max(1, round(settings.held_out * len(records))))
    chosen = set(random.Random(settings.seed).sample(range(len(records)), count))
    training = [record for number, record in enumerate(records) if number not in chosen]
    return training, [records[number] for number in sorted(chosen)]


def _check_vocabulary(data: TokenizedData, vocabulary: int) -> None:
    for document in data.documents:
        if (token := int(document.tokens.max())) >= vocabulary:
            raise InputError(
                f"{document.origin}: has the token {token}, the model knows {vocabulary}",
                hint="the tokenizer belongs to another model",
            )
