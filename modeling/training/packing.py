"""Packs documents into sequences of one length, each document as if it were alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dlo_export.modeling.training.documents import TokenDocument

IGNORED = -100
"""The label of tokens the loss does not count, transformers' value."""
_OPEN_SEQUENCES = 32


class PackedDocuments(Dataset[dict[str, torch.Tensor]]):
    """Sequences of documents. Positions start at 0 with each document, by which attention tells them apart.

    transformers' masks keep tokens of different documents from each other where `position_ids` jump and neither a mask
    nor a cache is given. Padding at a sequence's end is a document of its own.

    Args:
        documents: Each of at most `length` tokens.
        length: Of all sequences.
    """

    def __init__(self, documents: Sequence[TokenDocument], length: int) -> None:
        self._documents = documents
        self._length = length
        self._sequences = _first_fit([len(document.tokens) for document in documents], length)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """int64 [length] `input_ids`, `labels` and `position_ids`; bool [length] `counted`, False for padding."""
        ids = np.zeros(self._length, np.int64)  # padding is read too, and every model knows token 0
        labels = np.full(self._length, IGNORED, np.int64)
        positions = np.empty(self._length, np.int64)
        end = 0
        for number in self._sequences[index]:
            document = self._documents[number]
            start, end = end, end + len(document.tokens)
            ids[start:end] = document.tokens
            positions[start:end] = np.arange(end - start)
            # Nothing foretells a document's first token.
            labels[start + 1 : end] = np.where(document.learned[1:], document.tokens[1:], IGNORED)
        positions[end:] = np.arange(self._length - end)
        values: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
        values["counted"] = np.arange(self._length) < end
        return {name: torch.from_numpy(array) for name, array in values.items()}


@dataclass(frozen=True)
class PackedSets:
    """What a run learns from and what it is measured on.

    Attributes:
        training: To learn from.
        held_out: To measure on while it trains, and to bring the rate to the target on.
        others: By name, what else the trained model is measured on.
    """

    training: PackedDocuments
    held_out: PackedDocuments
    others: Mapping[str, PackedDocuments] = field(default_factory=dict, kw_only=True)

    @property
    def fitted(self) -> range:
        """Held-out sequences that thresholds are fitted on: every other one."""
        return range(0, len(self.held_out), 2)

    @property
    def not_fitted(self) -> range:
        """The others, which say what the rate is; all of them where there is a single one."""
        return range(1, len(self.held_out), 2) or range(len(self.held_out))


def stacked(sequences: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of sequences."""
    return {name: torch.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}


def _first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Puts each document into the first sequence that has room; only the last few stay open."""
    sequences: list[list[int]] = []
    left: list[int] = []
    for number, length in enumerate(lengths):
        for index in range(max(0, len(sequences) - _OPEN_SEQUENCES), len(sequences)):
            if left[index] >= length:
                break
        else:
            index = len(sequences)
            sequences.append([])
            left.append(room)
        sequences[index].append(number)
        left[index] -= length
    return sequences
