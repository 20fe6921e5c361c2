"""Whether the kernels of the dlo operators take a graph's widths: where they do not, no runtime opens it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE, ORT_OPS, WIDTH_MULTIPLE
from dlo_export.plugins.contract import unfit_widths

_OPS = {**ORT_OPS, GATHER_ACTIVE.name: GATHER_ACTIVE}


def check_kernel_widths(graph: ir.Graph, path: Path, lowering: str, hint: str) -> None:
    """Refuses a lowered graph whose dlo operators are as wide as no kernel is; others it has nothing against.

    Args:
        graph: Lowered; the weights say how wide it is, and are not read.
        path: Of the source, for messages.
        lowering: What `--lowering` calls it.
        hint: What to choose instead.

    Raises:
        InputError: With the fields of config.json that say so.
    """
    if (problem := kernel_width_problem(graph)) is not None:
        raise InputError(f"{path}: the kernels of --lowering {lowering} do not take {problem}", hint=hint)


def kernel_width_problem(graph: ir.Graph) -> str | None:
    """What no kernel of the graph's dlo operators takes, as config.json calls it; None where all is well."""
    found = dict.fromkeys(
        f"{name}_size {size}"
        for node in graph.all_nodes()
        if node.domain == DOMAIN
        for name, size in unfit_widths(dict(_weight_sizes(node))).items()
    )
    if not found:
        return None
    return f"{' and '.join(found)}; expected multiples of {WIDTH_MULTIPLE}"


def _weight_sizes(node: ir.Node) -> Iterator[tuple[str, int]]:
    """Sizes of the axes of a node's weights, by the schema's names."""
    for value, operand in zip(node.inputs, _OPS[node.op_type].inputs, strict=True):
        if value is not None and value.const_value is not None:
            yield from zip(operand.dims, value.const_value.shape.numpy(), strict=True)
