"""What every implementation of a `dlo` plugin must agree on, derived from the operators' schemas.

The RTX twins and the quick-deploy plugins read it directly, the C++ library through a header generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.graph_passes.spec.ops import WIDTH_MULTIPLE, PluginOp

T_DTYPES: Final = tuple(kind.name for kind in FLOATS)
"""What an operand of dtype "T" may be: one of these, the same for all operands of the node."""


def output_axes(op: PluginOp) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Where each axis of each output gets its size from: for every output, (input, axis) per axis, the first match."""
    sources: dict[str, tuple[int, int]] = {}
    for index, operand in enumerate(op.inputs):
        for axis, name in enumerate(operand.dims):
            sources.setdefault(name, (index, axis))
    return tuple(tuple(sources[name] for name in output.dims) for output in op.outputs)


def operand_dtypes(op: PluginOp, t_dtype: str) -> tuple[str, ...]:
    """The dtypes of inputs, then outputs, when the type parameter T is `t_dtype`."""
    return tuple(t_dtype if operand.dtype == "T" else operand.dtype for operand in (*op.inputs, *op.outputs))


SIZES_HINT: Final = "export this model with another --lowering than plugin"
"""What to do where `size_problems` finds any."""


def size_problems(op: PluginOp, shapes: Sequence[Sequence[int]]) -> list[str]:
    """What is wrong with the inputs' shapes, in words; empty when they fit the schema.

    Args:
        op: The operator.
        shapes: One shape per input; -1 is an axis not known yet.
    """
    if len(shapes) != len(op.inputs):
        return [f"dlo::{op.name} got {len(shapes)} inputs; the schema has {len(op.inputs)}"]
    problems: list[str] = []
    sizes: dict[str, int] = {}
    for operand, shape in zip(op.inputs, shapes, strict=True):
        if len(shape) != len(operand.dims):
            expected = ", ".join(operand.dims)
            problems.append(f"dlo::{op.name} input '{operand.name}' has shape {list(shape)}; expected [{expected}]")
            continue
        for name, size in zip(operand.dims, shape, strict=True):
            if size < 0:
                continue
            if sizes.setdefault(name, size) != size:
                problems.append(f"dlo::{op.name} input '{operand.name}' has {name} {size}; expected {sizes[name]}")
    problems += [f"dlo::{op.name} has {problem}" for problem in width_problems(sizes)]
    return problems


def unfit_widths(sizes: Mapping[str, int]) -> dict[str, int]:
    """Those widths that no kernel takes.

    Args:
        sizes: Of axes, by the schema's names.
    """
    return {name: sizes[name] for name in ("hidden", "intermediate") if sizes.get(name, 0) % WIDTH_MULTIPLE}


def width_problems(sizes: Mapping[str, int]) -> list[str]:
    """Which widths no kernel takes, in words.

    Args:
        sizes: Of axes, by the schema's names.
    """
    return [f"{name} {size}; expected a multiple of {WIDTH_MULTIPLE}" for name, size in unfit_widths(sizes).items()]


def weight_input(op: PluginOp) -> int:
    """Index of the first weight among the inputs: its two axes are the summed one and the output's columns."""
    return next(index for index, operand in enumerate(op.inputs) if operand.name.endswith("_weight"))
