"""Reads safetensors files: a JSON header and the tensors' bytes.

Written here rather than taken from the `safetensors` package because that one copies tensors when it reads them as
NumPy arrays, and because its errors name neither the file nor the tensor.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.dtypes import BY_SAFETENSORS
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.mapped_file import MappedFile, MappedTensor

# The limit of the reference implementation; a larger length means that these eight bytes are not one.
MAX_HEADER_BYTES = 100_000_000
# NumPy's limit was this long; a list of thousands of sizes would take minutes to multiply.
MAX_DIMENSIONS = 32
_LARGEST_SIZE = 2**63 - 1


def tensors_of_safetensors(file: MappedFile) -> dict[str, MappedTensor]:
    """Reads the header; the tensors' bytes stay in the file until they are used.

    Returns:
        The tensors by name, in the order of the header.

    Raises:
        CheckpointError: The file is truncated, its header is corrupt, or a tensor's bytes are not where it says.
    """
    header, data_start = _read_header(file)
    tensors: dict[str, MappedTensor] = {}
    problems: list[str] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensors[name] = _read_entry(entry, file, data_start)
        except ValueError as err:
            problems.append(f"{name}: {err}")
    if not problems:
        problems = _layout_problems(tensors, file, data_start)
    if problems:
        raise _corrupt(file.path, "the header is not consistent\n  " + "\n  ".join(problems))
    return tensors


def _corrupt(path: Path, text: str) -> CheckpointError:
    return CheckpointError(f"{path}: {text}", hint="the file is truncated or damaged: fetch it again")


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    if file.nbytes < 8:
        raise _corrupt(file.path, f"has {file.nbytes} bytes, expected the 8-byte header length of a safetensors file")
    length = int.from_bytes(file.mapping[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(file.path, f"is not a safetensors file (its header would be {length} bytes long)")
    if 8 + length > file.nbytes:
        raise _corrupt(file.path, f"has {file.nbytes} bytes, expected a header of {length} bytes after the first 8")
    try:
        header = json.loads(file.mapping[8 : 8 + length].decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as err:
        raise _corrupt(file.path, f"the header is not valid JSON ({err})") from err
    if not isinstance(header, dict):
        raise _corrupt(file.path, f"the header is a JSON {type(header).__name__}, expected an object")
    return header, 8 + length


def _object_without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicated: {', '.join(sorted(name for name, count in counts.items() if count > 1))}")
    return values


def _read_entry(entry: Any, file: MappedFile, data_start: int) -> MappedTensor:
    if not isinstance(entry, dict):
        raise ValueError(f"is {entry!r}, expected an object")
    kind = BY_SAFETENSORS.get(str(entry.get("dtype")))
    if kind is None:
        raise ValueError(f"dtype is {entry.get('dtype')!r}, expected one of {', '.join(BY_SAFETENSORS)}")
    shape, offsets = _sizes(entry, "shape"), _sizes(entry, "data_offsets")
    if len(offsets) != 2:
        raise ValueError(f"data_offsets are {list(offsets)}, expected a start and an end")
    start, stop = offsets
    expected = prod(shape) * kind.itemsize
    if stop - start != expected:
        raise ValueError(f"takes {stop - start} bytes, expected {expected} for {entry['dtype']} {list(shape)}")
    if data_start + stop > file.nbytes:
        raise ValueError(f"ends at byte {data_start + stop}, but the file has {file.nbytes}")
    return MappedTensor(shape, kind.numpy, file, data_start + start)


def _sizes(entry: dict[str, Any], field: str) -> tuple[int, ...]:
    values = entry.get(field)
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= _LARGEST_SIZE for value in values):
        raise ValueError(f"{field} is {values!r}, expected a list of sizes")
    if len(values) > MAX_DIMENSIONS:
        raise ValueError(f"{field} has {len(values)} entries, expected at most {MAX_DIMENSIONS}")
    return tuple(values)


def _layout_problems(tensors: dict[str, MappedTensor], file: MappedFile, data_start: int) -> list[str]:
    # The format wants the bytes covered exactly once; anything else is a damaged or a deliberately odd file.
    problems = []
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            problems.append(f"{name}: starts at byte {tensor.offset}, expected {end} (an overlap or a hole)")
        end = tensor.offset + tensor.nbytes
    if end != file.nbytes:
        problems.append(f"the tensors end at byte {end}, but the file has {file.nbytes}")
    return problems
