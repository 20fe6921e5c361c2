"""Tensors of a folder's files under the names that the model has for them, as transformers 5 finds them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.files.mapped_file import MappedTensor
from dlo_export.checkpoints.lazy_tensors import are_equal
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD

_BASE_PREFIX = "model."


@dataclass(frozen=True)
class StoredName:
    """A tensor and what its file calls it."""

    name: str
    tensor: MappedTensor

    def __str__(self) -> str:
        return f"{self.name} in {self.tensor.file.path.name}"


def model_tensors(stored: Iterable[StoredName], config: LlamaConfig) -> tuple[dict[str, MappedTensor], list[str]]:
    """Finds the model's tensors among those of its files.

    A checkpoint of the bare decoder (`LlamaModel`) has no `model.` before its names, one that was wrapped once more
    has it twice; and a tied matrix may be stored as the head alone. A tensor that is stored several times is taken
    where all copies are equal: which of them transformers would take depends on the order of the files.

    Args:
        stored: Every tensor of every file.
        config: Of the model.

    Returns:
        The tensors by the model's names, those it has no name for under their own; and copies that are not equal, one
        line each.
    """
    expected = {*config.tensor_shapes(), HEAD}
    copies: dict[str, list[StoredName]] = {}
    for each in stored:
        copies.setdefault(_model_name(each.name, expected), []).append(each)
    if config.tie_word_embeddings and EMBEDDING not in copies and HEAD in copies:
        copies[EMBEDDING] = copies.pop(HEAD)
    problems = [
        f"{first} and {other}: are not equal"
        for first, *others in copies.values()
        for other in others
        if not are_equal(first.tensor, other.tensor)
    ]
    return {name: same[0].tensor for name, same in copies.items()}, problems


def _model_name(name: str, expected: Collection[str]) -> str:
    for candidate in (name, f"{_BASE_PREFIX}{name}", name.removeprefix(_BASE_PREFIX)):
        if candidate in expected:
            return candidate
    return name
