"""GGUF files in parts, `NAME-00001-of-00003.gguf`, as llama.cpp splits large ones: read as one."""

from __future__ import annotations

import re
from pathlib import Path

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.gguf_file import GgufContents, read_gguf

PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
MAX_LISTED = 20
NUMBER, COUNT, TENSOR_COUNT = "split.no", "split.count", "split.tensors.count"


def read_gguf_parts(path: Path) -> tuple[list[MappedFile], GgufContents]:
    """Opens a GGUF file, with all its parts if it is one of several.

    Args:
        path: The file, or any of its parts; the others are looked for beside it, under the names llama.cpp gives them.

    Returns:
        The files in the order of their numbers, and what they hold: the metadata of the first part, all tensors.

    Raises:
        CheckpointError: A part is missing, damaged or of another file.
    """
    file = MappedFile(path)
    contents = read_gguf(file)
    count = contents.metadata.get(COUNT, 0)
    if count in (0, 1):
        return [file], contents
    files = [MappedFile(part) for part in _part_paths(path, count)]
    return files, _joined(files, count)


def _part_paths(path: Path, count: object) -> list[Path]:
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts ({COUNT}), but not named NAME-00001-of-{count!s:0>5}.gguf",
            hint="give the parts back the names they had when they were fetched",
        )
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}{match[4]}") for number in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: is one of {count} parts, not all of them are beside it\n  "
            + "\n  ".join(f"{name}: missing" for name in missing[:MAX_LISTED])
            + (f"\n  and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""),
            hint="fetch the missing parts into the same folder",
        )
    return parts


def _joined(files: list[MappedFile], count: int) -> GgufContents:
    parts = [read_gguf(file) for file in files]
    problems = [
        f"{file.path.name}: {key} is {part.metadata.get(key)!r}, expected {expected}"
        for number, (file, part) in enumerate(zip(files, parts, strict=True))
        for key, expected in ((COUNT, count), (NUMBER, number))
        if part.metadata.get(key) != expected
    ]
    tensors = dict(parts[0].tensors)
    for file, part in zip(files[1:], parts[1:], strict=True):
        problems += [
            f"{name}: duplicated in {tensors[name].file.path.name} and {file.path.name}"
            for name in part.tensors
            if name in tensors
        ]
        tensors.update(part.tensors)
    total = parts[0].metadata.get(TENSOR_COUNT, len(tensors))
    if total != len(tensors):
        problems.append(f"{TENSOR_COUNT} is {total!r}, but the parts hold {len(tensors)} tensors")
    if problems:
        raise CheckpointError(
            f"{files[0].path}: the parts do not belong together\n  " + "\n  ".join(problems),
            hint="fetch all parts of one file again",
        )
    return GgufContents(parts[0].metadata, tensors)
