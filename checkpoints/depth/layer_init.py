"""Initial weights of an injected decoder layer, from the original layers around it.

Every init is a function of one tensor at a time, so that deepening a model never needs more than two tensors in
memory. Sources: DLO (arXiv 2407.11030) for ``random``, ``copy``, ``identity``, ``linear`` and ``slerp``; TLI
(arXiv 2410.11654) and LLaMA-Pro (arXiv 2401.02415) for ``zero_out``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from dlo_export.checkpoints.errors import InputError

LAYER_INITS: tuple[str, ...] = ("zero_out", "copy", "linear", "slerp", "random", "linear_zero_out", "slerp_zero_out")
"""The inits, canonical names. The last two mix two layers first and zero the output projections of the mixture."""

_ALIASES = {"zeros": "zero_out", "identity": "zero_out", "copy_zero_out": "zero_out"}

_NEARLY_PARALLEL = 0.9995
"""Above this |cosine| the angle is too small to divide by its sine: slerp is replaced by linear interpolation."""


class LayerInitError(InputError):
    """An init is unknown or cannot be applied to the tensors it was given."""


def canonical_init(init: str) -> str:
    """Returns the canonical name of an init, resolving ``zeros`` and ``identity`` to ``zero_out``.

    Raises:
        LayerInitError: The name is not an init.
    """
    name = _ALIASES.get(init, init)
    if name not in LAYER_INITS:
        choices = ", ".join((*LAYER_INITS, *_ALIASES))
        raise LayerInitError(
            f"layer init: found {init!r}, expected one of {choices}\n\nhint: zero_out keeps the function"
        )
    return name


def preserves_function(init: str) -> bool:
    """Whether a layer made by this init passes the residual stream through unchanged."""
    return canonical_init(init).endswith("zero_out")


def needs_previous(init: str) -> bool:
    """Whether this init mixes the source layer with the layer before it."""
    return canonical_init(init).startswith(("linear", "slerp"))


def init_tensor(
    init: str,
    role: str,
    source: np.ndarray,
    previous: np.ndarray | None = None,
    *,
    seed: int | Sequence[int] = 0,
    initializer_range: float = 0.02,
) -> np.ndarray:
    """Computes one tensor of an injected layer.

    16-bit tensors are computed in float32 and rounded once. The result never shares memory with its arguments.

    Args:
        init: One of `LAYER_INITS` or an alias of it.
        role: The tensor's name inside its layer, for example ``self_attn.o_proj.weight``.
        source: The tensor of the original layer the new one derives from, any floating dtype and shape.
        previous: The same tensor of the layer before the source; None for the first layer, where ``linear`` and
            ``slerp`` fall back to a copy.
        seed: Seed of ``random``. Give each layer its own, for example ``(seed, position)``; tensors of one layer
            already differ by their role.
        initializer_range: Standard deviation of ``random``.

    Returns:
        A new array of the source's shape and dtype.

    Raises:
        LayerInitError: Unknown init, or `previous` has another shape than `source`.
    """
    name = canonical_init(init)
    if previous is not None and needs_previous(name) and previous.shape != source.shape:
        raise LayerInitError(
            f"layer init {name}: {role} has shape {previous.shape} in the layer before, expected {source.shape}"
            "\n\nhint: layers of different shapes cannot be mixed; use init copy or zero_out"
        )
    if name.endswith("zero_out") and is_output_projection(role):
        return np.zeros_like(source)
    if name == "random":
        return _random(role, source, seed, initializer_range)
    if needs_previous(name) and previous is not None:
        mix = slerp if name.startswith("slerp") else lerp
        return mix(previous, source)
    return np.array(source, copy=True)


def is_output_projection(role: str) -> bool:
    """Whether this tensor is one of those whose zeros make a layer the identity: both residual branches' last ones."""
    return role.rpartition(".")[0] in ("self_attn.o_proj", "mlp.down_proj")


def lerp(first: np.ndarray, second: np.ndarray, t: float = 0.5) -> np.ndarray:
    """Linear interpolation ``(1 - t)·first + t·second`` in at least float32, rounded to the dtype of `second`."""
    compute = _compute_dtype(second)
    mixed: np.ndarray = first.astype(compute) * compute.type(1 - t)
    mixed += second.astype(compute, copy=False) * compute.type(t)
    return mixed.astype(second.dtype, copy=False)


def slerp(first: np.ndarray, second: np.ndarray, t: float = 0.5) -> np.ndarray:
    """Spherical interpolation of two tensors seen as flat vectors, in at least float32.

    The angle is measured between the normalised vectors and the weights are applied to the tensors as they are, so
    their norms interpolate too. Where the angle is tiny (|cos| > 0.9995) or undefined (a zero tensor), plain `lerp`.
    """
    compute = _compute_dtype(second)
    a, b = first.astype(compute, copy=False), second.astype(compute, copy=False)
    # Norms are multiplied in Python floats: their float32 product overflows for large tensors.
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / norms if norms > 0 else 1.0
    if abs(cosine) > _NEARLY_PARALLEL:
        return lerp(first, second, t)
    angle = np.arccos(cosine)
    weight_a, weight_b = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    mixed: np.ndarray = a * compute.type(weight_a)
    mixed += b * compute.type(weight_b)
    return mixed.astype(second.dtype, copy=False)


def _random(role: str, source: np.ndarray, seed: int | Sequence[int], initializer_range: float) -> np.ndarray:
    """Fresh weights as the model's own initialisation makes them: norms 1, biases 0, matrices normal."""
    if "layernorm" in role:
        return np.ones_like(source)
    if role.endswith(".bias"):
        return np.zeros_like(source)
    entropy = [seed] if isinstance(seed, int) else list(seed)
    generator = np.random.default_rng([*entropy, zlib.crc32(role.encode())])
    values = generator.standard_normal(source.shape, dtype=np.float32)
    values *= np.float32(initializer_range)
    return values.astype(source.dtype, copy=False)


def _compute_dtype(array: np.ndarray) -> np.dtype:
    """float32 for 16-bit types (bfloat16 included, which NumPy cannot compute in), the array's own otherwise."""
    return np.dtype(np.float32) if array.dtype.itemsize < 4 else array.dtype
