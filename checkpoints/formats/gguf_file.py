"""The header of a GGUF file: typed metadata, and where the tensors are.

The header is parsed here because gguf.GGUFReader wraps each of the 100,000 strings of a vocabulary in NumPy arrays
(1.8 s for SmolLM2, 0.1 s here) and reports a truncated file as an index error.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.gguf_tensor import FLOAT_TYPES, QUANTISED_TYPES, GgufTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# struct formats of the scalar metadata types, by their numbers in the format.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufContents:
    """What the header of a GGUF file says.

    Attributes:
        metadata: Values by key; float32 ones as the shortest decimal equal to them (1e-05, not 9.9999997e-06).
        tensors: By their names in the file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(file: MappedFile) -> GgufContents:
    """Reads the header; the tensors' bytes stay in the file until they are used.

    Raises:
        CheckpointError: The file is truncated or corrupt, or holds tensors of an unsupported type.
    """
    cursor = _Cursor(file)
    try:
        return _read_contents(cursor, file)
    except (struct.error, UnicodeDecodeError, ValueError) as err:
        raise CheckpointError(
            f"{file.path}: not a readable GGUF file (at byte {cursor.position}: {err})",
            hint="the file is truncated or damaged: fetch it again",
        ) from err


class _Cursor:
    """Reads little-endian values one after the other; every read past the end raises."""

    def __init__(self, file: MappedFile) -> None:
        self.buffer = file.mapping
        self.position = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.buffer, self.position)
        self.position += struct.calcsize(f"<{code}")
        return float(str(np.float32(value))) if code == "f" else value

    def string(self) -> str:
        length = self.scalar("Q")
        self.require(length)
        value = self.buffer[self.position : self.position + length]
        self.position += length
        return value.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"unknown metadata type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        # Every item takes bytes; a count beyond them would otherwise loop for hours.
        self.require(count)
        if item == STRING:
            return [self.string() for _ in range(count)]
        if item not in SCALARS:
            raise ValueError(f"arrays of metadata type {item} are unknown")
        return [self.scalar(SCALARS[item]) for _ in range(count)]

    def require(self, nbytes: int) -> None:
        if nbytes > len(self.buffer) - self.position:
            raise ValueError(f"{nbytes} more bytes expected, the file ends after {len(self.buffer) - self.position}")


def _read_contents(cursor: _Cursor, file: MappedFile) -> GgufContents:
    magic = cursor.buffer[:4]
    if magic != MAGIC:
        raise ValueError(f"starts with {magic!r}, expected {MAGIC!r}")
    cursor.position = 4
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(f"version is {version}, expected {' or '.join(map(str, VERSIONS))}, little-endian")
    tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"metadata key {key} is duplicated")
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _tensors(entries, data_start, file)
    _check_places(tensors, alignment, file)
    return GgufContents(metadata, tensors)


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _read_entry(cursor: _Cursor) -> _Entry:
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    if 0 in shape:
        raise ValueError(f"{name} is empty: {list(shape)}")
    return _Entry(name, shape, type_number=cursor.scalar("I"), offset=cursor.scalar("Q"))


def _tensors(entries: list[_Entry], data_start: int, file: MappedFile) -> dict[str, GgufTensor]:
    supported = (*FLOAT_TYPES, *QUANTISED_TYPES)
    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    unsupported = [
        f"{entry.name}: is {names.get(entry.type_number, f'type {entry.type_number}')}"
        for entry in entries
        if names.get(entry.type_number) not in supported
    ]
    if unsupported:
        raise CheckpointError(
            f"{file.path}: tensors of types that cannot be read, expected {', '.join(supported)}\n  "
            + "\n  ".join(unsupported),
            hint="use a GGUF file of another quantisation, or the original Hugging Face checkpoint",
        )
    tensors: dict[str, GgufTensor] = {}
    problems: list[str] = []
    for entry in entries:
        tensor = GgufTensor(entry.shape, file, data_start + entry.offset, names[entry.type_number])
        block = tensor.block_columns
        if entry.name in tensors:
            problems.append(f"{entry.name}: duplicated")
        if entry.shape[-1] % block:
            problems.append(
                f"{entry.name}: rows of {entry.shape[-1]} are not whole {tensor.stored_type} blocks of {block}"
            )
        end = tensor.offset + tensor.stored_nbytes
        if end > file.nbytes:
            problems.append(f"{entry.name}: ends at byte {end}, but the file has {file.nbytes}")
        tensors[entry.name] = tensor
    if problems:
        raise CheckpointError(
            f"{file.path}: the tensor table is not consistent\n  " + "\n  ".join(problems),
            hint="the file is truncated or damaged: fetch it again",
        )
    return tensors


def _check_places(tensors: Mapping[str, GgufTensor], alignment: int, file: MappedFile) -> None:
    """Refuses tensors that share bytes, or start where no writer puts one: their offsets are damaged."""
    in_order = sorted(tensors.items(), key=lambda item: item[1].offset)
    problems = [
        f"{name}: starts at byte {tensor.offset}, expected a multiple of {alignment}"
        for name, tensor in in_order
        if tensor.offset % alignment
    ]
    problems += [
        f"{name}: starts at byte {tensor.offset}, inside {name_before}"
        for (name_before, before), (name, tensor) in pairwise(in_order)
        if tensor.offset < before.offset + before.stored_nbytes
    ]
    if problems:
        raise CheckpointError(
            f"{file.path}: the tensors' places are not consistent\n  " + "\n  ".join(problems),
            hint="the file is damaged: fetch it again",
        )
