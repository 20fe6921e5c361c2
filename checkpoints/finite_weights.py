"""Weights are numbers: NaN and infinity are refused, by tensor name, where values are read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlo_export.checkpoints.dtypes import BY_NAME, FLOATS
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import BlockTensor, LazyTensor

_IEEE_TYPES = {kind.numpy for kind in (*FLOATS, BY_NAME["float64"])}
# Elements looked at together: few enough to stay in a core's cache between the two looks.
_AT_ONCE = 1 << 16


class NonFiniteWeightError(InputError):
    """A weight holds NaN or infinity.

    Args:
        origin: Where it lies.
        name: Of the tensor.
        index: Of the first such element.
        value: What stands there.
    """

    def __init__(self, origin: Path | str, name: str, index: Sequence[int], value: float) -> None:
        super().__init__(
            f"{origin}: {name}{[int(i) for i in index]} is {value}, expected finite numbers",
            hint="the model is damaged, or its training diverged: take an earlier checkpoint",
        )


def all_finite(values: np.ndarray) -> bool:
    """Whether an array of floats holds neither NaN nor infinity; True for integers.

    It costs a twentieth of what hashing or writing the array does, and no memory.
    """
    if values.dtype not in _IEEE_TYPES:
        return True
    # As integers, because those have the fast reductions: what is not finite has all exponent bits set, so a positive
    # one is the largest signed integer there is, a negative one the largest unsigned one.
    signed, unsigned = np.dtype(f"i{values.dtype.itemsize}"), np.dtype(f"u{values.dtype.itemsize}")
    infinity = int(np.array(np.inf, values.dtype).view(unsigned))
    negative_infinity = int(np.array(-np.inf, values.dtype).view(unsigned))
    flat = values.ravel(order="K")  # as they lie: a transposed matrix is not put in order first
    parts = (flat[start : start + _AT_ONCE] for start in range(0, flat.size, _AT_ONCE))
    return all(
        int(part.view(signed).max()) < infinity and int(part.view(unsigned).max()) < negative_infinity for part in parts
    )


def check_finite(values: np.ndarray, name: str, origin: Path | str, *, first_row: int = 0) -> None:
    """Refuses values that are not finite.

    Args:
        values: A tensor, or rows of it.
        name: Of the tensor.
        origin: Where it lies.
        first_row: Of the tensor, that `values` begin with.

    Raises:
        NonFiniteWeightError: Naming the first of them.
    """
    if all_finite(values):
        return
    place = np.argwhere(~np.isfinite(values.astype(np.float64)))[0]
    index = [int(i) + (first_row if axis == 0 else 0) for axis, i in enumerate(place)]
    raise NonFiniteWeightError(origin, name, index, float(values[tuple(place)]))


def finite_tensors(tensors: Mapping[str, LazyTensor], origin: Path) -> dict[str, LazyTensor]:
    """The same tensors, which refuse to give values that are not finite.

    Args:
        tensors: By name.
        origin: Where they lie, for messages.
    """
    return {
        name: (FiniteBlockTensor if isinstance(tensor, BlockTensor) else FiniteTensor)(name, tensor, origin)
        for name, tensor in tensors.items()
    }


class FiniteTensor:
    """A lazy tensor whose values are checked when they are read.

    Args:
        name: For messages.
        tensor: Gives the values.
        origin: Where it lies, for messages.
    """

    def __init__(self, name: str, tensor: LazyTensor, origin: Path) -> None:
        self._name = name
        self._tensor = tensor
        self._origin = origin
        # A matrix that is written transposed is read from end to end for every chunk of its columns.
        self._looked_at: set[tuple[int, int]] = set()

    @property
    def shape(self) -> tuple[int, ...]:
        """As the tensor's."""
        return self._tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """As the tensor's."""
        return self._tensor.dtype

    @property
    def nbytes(self) -> int:
        """As the tensor's."""
        return self._tensor.nbytes

    def numpy(self) -> np.ndarray:
        """The whole tensor.

        Raises:
            NonFiniteWeightError: A value is not finite.
        """
        values = self._tensor.numpy()
        check_finite(values, self._name, self._origin)
        return values

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`; looked at once, however often they are read.

        Raises:
            NonFiniteWeightError: A value of them is not finite.
        """
        values = self._tensor.rows(start, stop)
        if (start, stop) not in self._looked_at:
            check_finite(values, self._name, self._origin, first_row=start)
            self._looked_at.add((start, stop))
        return values

    def release(self) -> None:
        """Gives back the memory that reading took."""
        self._tensor.release()


class FiniteBlockTensor(FiniteTensor):
    """The same of a tensor that is stored in blocks."""

    _tensor: BlockTensor

    @property
    def block_columns(self) -> int:
        """As the tensor's."""
        return self._tensor.block_columns

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """numpy()[rows, columns].

        Raises:
            NonFiniteWeightError: A value of them is not finite.
        """
        values = self._tensor.part(rows, columns)
        check_finite(values, self._name, f"{self._origin} (columns from {columns.start} on)", first_row=rows.start)
        return values
