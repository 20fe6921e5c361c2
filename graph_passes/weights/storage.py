"""What every form in which a graph stores a weight can do, whatever the form is."""

from __future__ import annotations

import abc
import dataclasses
import mmap
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import LazyTensor, TensorOfRows

UniqueName = Callable[[str], str]


class Place(NamedTuple):
    """Where a constant, or what is prepared from it, enters the computation."""

    node: ir.Node
    input_index: int

    @property
    def value(self) -> ir.Value | None:
        """What enters there; None where nothing does, also in a node that lacks the input."""
        inputs = self.node.inputs
        return inputs[self.input_index] if self.input_index < len(inputs) else None


# For every place of a weight, which constant stands for which: one for a plain matrix, several for a quantised one.
Replacements = Mapping[Place, Mapping[ir.Value, ir.Value]]


class WeightStorage(abc.ABC):
    """A constant matrix or vector that a node computes with.

    Args:
        node: Which computes with it.
        shape: As a checkpoint has it: [out, in] or [elements].
        dtype: Of the numbers the node computes with, whatever they are stored as.

    Attributes:
        node: As given.
        shape: As given.
        dtype: As given.
    """

    def __init__(self, node: ir.Node, shape: tuple[int, ...], dtype: ir.DataType) -> None:
        self.node = node
        self.shape = shape
        self.dtype = dtype

    @property
    @abc.abstractmethod
    def constants(self) -> tuple[ir.Value, ...]:
        """Initializers or outputs of Constant nodes that hold it, the largest first."""

    @property
    @abc.abstractmethod
    def form(self) -> str:
        """In a word or two, for people."""

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` in the shape of a checkpoint, of type `dtype`."""

    @abc.abstractmethod
    def stored_alike(self, name: str, source: LazyTensor, unique: UniqueName) -> Replacements:
        """Other contents in the same form, as new constants: lazy, and in no graph yet.

        Args:
            name: Of the constant; parts of a quantised weight add what they are.
            source: The contents, of this shape.
            unique: Makes a name unique in the graph.
        """


@dataclasses.dataclass(frozen=True)
class StoredRows(TensorOfRows):
    """Some rows of a stored weight, seen as a checkpoint's tensor.

    Attributes:
        storage: Holds them.
        start: First row.
        stop: Behind the last row.
    """

    storage: WeightStorage
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Linear weights are [out, in]."""
        return (self.stop - self.start, *self.storage.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Element type of `numpy()`."""
        return self.storage.dtype.numpy()

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some of them: a view of the mapped file where they are stored as they are read."""
        return self.storage.rows(self.start + start, min(self.start + stop, self.stop))

    def release(self) -> None:
        """Gives back the pages of the graph's data files that reading took; the mappings stay, arrays too."""
        for constant in self.storage.constants:
            tensor = ir.convenience.get_const_tensor(constant)
            if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
                tensor.raw.madvise(mmap.MADV_DONTNEED)
