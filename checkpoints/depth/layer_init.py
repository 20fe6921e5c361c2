"""Initial weights of an injected decoder layer, from the original layers around it.

Every init is a function of one tensor at a time, and of the same rows of the tensors around it, so that deepening a
model never needs more than a few chunks of rows in memory. Sources: DLO (arXiv 2407.11030) for ``random``, ``copy``,
``identity``, ``linear`` and ``slerp``; TLI (arXiv 2410.11654) and LLaMA-Pro (arXiv 2401.02415) for ``zero_out``.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import LazyTensor, TensorOfRows, rows_at_once
from dlo_export.checkpoints.llama_layer import LAYER_TABLES, LLAMA_LAYER

LAYER_INITS: tuple[str, ...] = ("zero_out", "copy", "linear", "slerp", "random", "linear_zero_out", "slerp_zero_out")
"""The inits, canonical names. The last two mix two layers first and zero the output projections of the mixture."""

_ALIASES = {"zeros": "zero_out", "identity": "zero_out", "copy_zero_out": "zero_out"}

_NEARLY_PARALLEL = 0.9995
"""Above this |cosine| the angle is too small to divide by its sine: slerp is replaced by linear interpolation."""


_NORMS = frozenset(module.weight for table in LAYER_TABLES for module in table if module.is_norm)


class LayerInitError(InputError):
    """An init is unknown or cannot be applied to the tensors it was given."""


def canonical_init(init: str) -> str:
    """Returns the canonical name of an init, resolving ``zeros`` and ``identity`` to ``zero_out``.

    Raises:
        LayerInitError: The name is not an init.
    """
    choices = (*LAYER_INITS, *_ALIASES)
    if init not in choices:
        raise LayerInitError(
            f"layer init: found {init!r}, expected one of {', '.join(choices)}", hint="zero_out keeps the function"
        )
    return _ALIASES.get(init, init)


def preserves_function(init: str) -> bool:
    """Whether a layer made by this init passes the residual stream through unchanged."""
    return canonical_init(init).endswith("zero_out")


def needs_previous(init: str) -> bool:
    """Whether this init mixes the source layer with the layer before it."""
    return canonical_init(init).startswith(("linear", "slerp"))


class InitialTensor(TensorOfRows):
    """A tensor of an injected layer, computed from the originals' when it is read: a lazy tensor.

    16-bit tensors are computed in float32 and rounded once. Arrays never share memory with the originals'.

    Args:
        init: One of `LAYER_INITS` or an alias of it.
        tensor: The tensor's name inside its layer, for example ``self_attn.o_proj.weight``.
        source: The tensor of the original layer the new one derives from, any floating dtype and shape.
        previous: The same tensor of the layer before the source; None for the first layer, where ``linear`` and
            ``slerp`` fall back to a copy.
        seed: Of ``random``. Give each layer its own, for example ``(seed, position)``; tensors of one layer already
            differ by their names.
        initializer_range: Standard deviation of ``random``.

    Raises:
        LayerInitError: Unknown init, or the two layers differ in shape and cannot be mixed.
    """

    def __init__(
        self,
        init: str,
        tensor: str,
        source: LazyTensor,
        previous: LazyTensor | None,
        *,
        seed: int | Sequence[int] = 0,
        initializer_range: float = 0.02,
    ) -> None:
        self._init = canonical_init(init)
        self._tensor = tensor
        self._source = source
        self._previous = previous if needs_previous(init) else None
        self._seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self._initializer_range = initializer_range
        if self._previous is not None and self._previous.shape != source.shape:
            raise LayerInitError(
                f"layer init {self._init}: {tensor} has shape {self._previous.shape} in the layer before, "
                f"expected {source.shape}",
                hint="layers of different shapes cannot be mixed; use init copy or zero_out",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""
        return self._source.shape

    @property
    def dtype(self) -> np.dtype:
        """The source's."""
        return self._source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Computes rows `start:stop`, in memory of their own."""
        stop = min(stop, self.shape[0])
        if preserves_function(self._init) and self._tensor in LLAMA_LAYER.branch_ends:
            return np.zeros((stop - start, *self.shape[1:]), self.dtype)
        if self._init == "random":
            return self._random_rows(start, stop)
        if self._previous is None:
            return np.array(self._source.rows(start, stop), copy=True)
        shares = self._shares  # before the rows are held: slerp's first reads both tensors through
        return _mixed(self._previous.rows(start, stop), self._source.rows(start, stop), shares)

    def release(self) -> None:
        """Releases the tensors it is computed from."""
        self._source.release()
        if self._previous is not None:
            self._previous.release()

    @functools.cached_property
    def _shares(self) -> tuple[float, float]:
        """Of the layer before and of the source in their mixture."""
        assert self._previous is not None, "only two layers are mixed"
        return slerp_shares(self._previous, self._source) if self._init.startswith("slerp") else (0.5, 0.5)

    def _random_rows(self, start: int, stop: int) -> np.ndarray:
        """Fresh weights as the model's own initialisation makes them: norms 1, biases 0, matrices normal."""
        shape = (stop - start, *self.shape[1:])
        if self._tensor in _NORMS:
            return np.ones(shape, self.dtype)
        if self._tensor.endswith(".bias"):
            return np.zeros(shape, self.dtype)
        generator = np.random.default_rng([*self._seed, zlib.crc32(self._tensor.encode())])
        # One sequence of numbers for the whole tensor, whatever rows are asked for: those before are drawn and dropped.
        step = rows_at_once(self.shape[0], self.nbytes)
        for first in range(0, start, step):
            generator.standard_normal((min(step, start - first), *self.shape[1:]), dtype=np.float32)
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(self._initializer_range)
        return values.astype(self.dtype, copy=False)


def slerp_shares(first: LazyTensor, second: LazyTensor) -> tuple[float, float]:
    """Shares of two tensors, seen as flat vectors, half-way between them in their spherical interpolation.

    The angle is measured between the normalised vectors and the shares are of the tensors as they are, so their norms
    interpolate too. Where the angle is tiny (|cos| > 0.9995) or undefined (a zero tensor), the shares are linear's.
    """
    squares_a = squares_b = product = 0.0
    step = rows_at_once(second.shape[0], second.nbytes)
    for start in range(0, second.shape[0], step):
        a = _computable(first.rows(start, start + step)).reshape(-1)
        b = _computable(second.rows(start, start + step)).reshape(-1)
        squares_a += float(np.vdot(a, a))
        squares_b += float(np.vdot(b, b))
        product += float(np.vdot(a, b))
        first.release()
        second.release()
    # The roots are multiplied, not the squares: their product overflows for large tensors.
    norms = math.sqrt(squares_a) * math.sqrt(squares_b)
    cosine = product / norms if norms > 0 else 1.0
    if abs(cosine) > _NEARLY_PARALLEL:
        return 0.5, 0.5
    angle = math.acos(cosine)
    share = math.sin(0.5 * angle) / math.sin(angle)
    return share, share


def _mixed(first: np.ndarray, second: np.ndarray, shares: tuple[float, float]) -> np.ndarray:
    """The weighted sum in at least float32, rounded to the dtype of `second`."""
    a, b = _computable(first), _computable(second)
    mixed: np.ndarray = a * a.dtype.type(shares[0])
    mixed += b * b.dtype.type(shares[1])
    return mixed.astype(second.dtype, copy=False)


def _computable(array: np.ndarray) -> np.ndarray:
    """In float32 if it is of a 16-bit type (NumPy cannot compute in bfloat16 at all), else as it is."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
