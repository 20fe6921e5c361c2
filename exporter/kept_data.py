"""Data files of somebody's graph that go on as they are: only what is new is written anew."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.file_digest import HashedFile, known_sha256, remember_sha256
from dlo_export.checkpoints.files.reflink import clone_file
from dlo_export.exporter.weight_file import FiniteWrites, KeptNames, Progress, external_tensors
from dlo_export.runtimes.artefact.description import ADDED_NAME, ENGINES_NAME, WEIGHTS_NAME, KeptData, KeptHow

# Where the new graph reads less of a file, that part is written anew: a file that several graphs share, or one whose
# weights the passes have written in another form, is not carried along for the rest of it.
_LEAST_USED = 0.5
_CHUNK_BYTES = 8 << 20  # a multiple of every element's size
# What a folder holds under such names is a tokenizer, a setting, a graph, an engine, a checkpoint, or ours.
_SUFFIXES_WITH_MEANING = {".json", ".jinja", ".txt", ".model", ".onnx", ".engine", ".safetensors", ".gguf"}
_PREFIXES_WITH_MEANING = (".", "dlo_")


@dataclasses.dataclass(frozen=True)
class KeptFile:
    """An external data file that the new graph goes on reading.

    Attributes:
        source: Where it lies, links followed.
        name: Its path relative to its graph's folder, and to the artefact's, with forward slashes.
        bytes: Its size.
        tensors: What the new graph reads of it, one for each range, by offset.
    """

    source: Path
    name: str
    bytes: int
    tensors: tuple[ir.ExternalTensor, ...]

    @property
    def unused_bytes(self) -> int:
        """What the new graph does not read: paddings, and weights that it has in another form."""
        return self.bytes - sum(tensor.nbytes for tensor in self.tensors)

    def place(self, folder: Path, *, link: bool) -> KeptHow:
        """Has the file stand in a folder without a byte being written, where that can be.

        Args:
            folder: The artefact.
            link: Make a hard link.

        Returns:
            How it was done; "copy" where nothing was.

        Raises:
            MachineError: There can be no link.
        """
        target = folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(self.source, target)
            except OSError as err:
                raise MachineError(
                    f"--link-weights: {self.source} cannot be linked into {folder.parent}: {err.strerror}",
                    hint="leave --link-weights out, or give an output on the same file system, in which you may link",
                ) from err
            return "hard link"
        with self.source.open("rb") as source:
            return "reflink" if clone_file(source, target) else "copy"

    def read_through(self, folder: Path, how: KeptHow, progress: Progress, *, allow_nonfinite: bool) -> KeptData:
        """Reads the file once: for its hash, for what its weights hold, and to write it where it is copied.

        Args:
            folder: The artefact, in which it was placed.
            how: What `place` said.
            progress: Told after every chunk.
            allow_nonfinite: Do not look at the weights.

        Raises:
            NonFiniteWeightError: A weight is not finite.
            InputError: Somebody changed the file meanwhile.
        """
        target = folder / self.name
        with (
            self.source.open("rb", buffering=0) as source,
            HashedFile(target, write=how == "copy", total=self.bytes) as file,
        ):
            before = os.fstat(source.fileno())
            read = _Passage(source, file, self.bytes, progress)
            for tensor in () if allow_nonfinite else self.tensors:
                start = tensor.offset or 0
                read.pass_on(start)
                read.pass_on(start + tensor.nbytes, FiniteWrites(file, tensor))
            read.pass_on(self.bytes)
            after = os.fstat(source.fileno())
            if (before.st_mtime_ns, self.bytes) != (after.st_mtime_ns, after.st_size):
                raise _changed(self.source)
        remember_sha256(self.source, known_sha256(target))
        return KeptData(target, how, self.unused_bytes)


def kept_files(model: ir.Model, data_files: Mapping[Path, str], file_bytes: int | None = None) -> tuple[KeptFile, ...]:
    """Which of its source's data files a graph keeps.

    Args:
        model: Complete; its untouched weights lie where they lay.
        data_files: Paths relative to the source's folder, by where the files lie, links followed.
        file_bytes: A larger file is not kept: its weights are written anew, in files of that size.

    Returns:
        Those of which most is still read, in the order of their names.
    """
    ranges: dict[Path, dict[tuple[int, int], ir.ExternalTensor]] = collections.defaultdict(dict)
    for tensor in external_tensors(model.graph).values():
        ranges[Path(tensor.path)].setdefault((tensor.offset or 0, tensor.nbytes), tensor)
    found = []
    for path, name in data_files.items():
        tensors = tuple(tensor for _, tensor in sorted(ranges[path].items(), key=lambda item: item[0]))
        file = KeptFile(path, str(PurePosixPath(name)), path.stat().st_size, tensors)
        if file_bytes is not None and file.bytes > file_bytes:
            continue
        used = file.bytes - file.unused_bytes
        if tensors and _may_be_called(file.name) and not _overlap(tensors) and used >= _LEAST_USED * file.bytes:
            found.append(file)
    # Of two names that some file system takes for one, neither.
    times = collections.Counter(file.name.casefold() for file in found)
    return tuple(sorted((file for file in found if times[file.name.casefold()] == 1), key=lambda file: file.name))


def kept_names(kept: Sequence[KeptFile]) -> KeptNames:
    """What `save_weights` wants to know of them."""
    return {file.source: file.name for file in kept}


def new_weights_name(kept: Sequence[KeptFile]) -> str:
    """What the first file of new weights is called beside kept ones; its name, with a number, is later ones' too."""
    taken = [PurePosixPath(file.name).parts[0].casefold() for file in kept]
    return ADDED_NAME if any(name.startswith(WEIGHTS_NAME) for name in taken) else WEIGHTS_NAME


class _Passage:
    """Reads a file forwards, chunk by chunk, into another.

    Args:
        source: Unbuffered, at its beginning.
        target: Likewise.
        total: Its size in bytes.
        progress: Told after every chunk.
    """

    def __init__(self, source: BinaryIO, target: HashedFile, total: int, progress: Progress) -> None:
        self._source, self._target, self._total, self._progress = source, target, total, progress
        self._position = 0

    def pass_on(self, end: int, looked_at: FiniteWrites | None = None) -> None:
        """Everything up to an offset, through what looks at it where that is given.

        Raises:
            InputError: The file is shorter by now.
        """
        while (left := end - self._position) > 0:
            chunk = self._target.buffer(min(left, _CHUNK_BYTES))
            _fill(self._source, chunk)
            (looked_at or self._target).write(chunk)
            self._position += chunk.nbytes
            self._progress(self._position, self._total)


def _fill(source: BinaryIO, chunk: np.ndarray) -> None:
    done = 0
    while done < chunk.nbytes:
        read = source.readinto(chunk[done:])  # type: ignore[attr-defined]  # an unbuffered file has it
        if not read:
            raise _changed(Path(source.name))
        done += read


def _changed(path: Path) -> InputError:
    return InputError(f"{path}: was changed while it was being read", hint="run again when it is complete")


def _may_be_called(name: str) -> bool:
    """Whether a file of this name means nothing else to whoever opens the artefact."""
    path = PurePosixPath(name.casefold())
    means = path.parts[0] == ENGINES_NAME or path.suffix in _SUFFIXES_WITH_MEANING
    hidden = any(part.startswith(_PREFIXES_WITH_MEANING) for part in path.parts)  # ".." among them
    return name.isprintable() and not path.is_absolute() and not means and not hidden


def _overlap(tensors: Sequence[ir.ExternalTensor]) -> bool:
    """Whether two ranges have bytes in common: they are looked at one after the other."""
    ends = [(tensor.offset or 0) + tensor.nbytes for tensor in tensors]
    return any((later.offset or 0) < end for later, end in zip(tensors[1:], ends, strict=False))
