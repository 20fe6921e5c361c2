"""The kernels by operator, and a launch on tensors for tests and benchmarks."""

from __future__ import annotations

from typing import Any, Final

from triton.runtime import JITFunction

from dlo_export.graph_passes.spec.ops import ORT_OPS
from dlo_export.plugins.contract import weight_input
from dlo_export.plugins.router_scores.kernel import router_scores_kernel
from dlo_export.plugins.skip_down.kernel import skip_down_kernel
from dlo_export.plugins.skip_gate_up.kernel import skip_gate_up_kernel
from dlo_export.plugins.tiles import TileName, jit_tile_of, tile_for, tile_of

KERNELS: Final[dict[str, Any]] = {
    "SkipGateUp": skip_gate_up_kernel,
    "SkipDown": skip_down_kernel,
    "RouterScores": router_scores_kernel,
}
INTERPRETED: Final = not isinstance(skip_gate_up_kernel, JITFunction)
"""Whether TRITON_INTERPRET was set when triton was imported: its interpreter runs the kernels, on any machine."""
INTEGERS: Final = 3
"""Between inputs and outputs: tokens, then rows and columns of the weight."""


def launch(
    op_name: str,
    *operands: Any,
    dtype: str,
    tile_name: TileName | None = None,
    kernel: Any = None,
    **options: Any,
) -> None:
    """Launches a kernel on tensors that Triton takes (data_ptr, dtype, shape), inputs then output, all contiguous.

    Args:
        op_name: Of an operator.
        *operands: The schema's inputs and outputs.
        dtype: T as the schema names it.
        tile_name: The tile to use; by default the one the number of tokens asks for.
        kernel: One that wraps the operator's, and takes its arguments.
        **options: More constants of such a one, and how Triton launches it.
    """
    op = ORT_OPS[op_name]
    inputs = operands[: len(op.inputs)]
    batch, sequence, _ = operands[0].shape
    depth, columns = operands[weight_input(op)].shape
    tokens = batch * sequence
    name = tile_name or tile_for(tokens)
    tile = tile_of(op_name, name, dtype) if INTERPRETED else jit_tile_of(op_name, name, dtype, target())
    (kernel or KERNELS[op_name])[tile.grid(tokens, columns)](
        *inputs,
        tokens,
        depth,
        columns,
        *operands[len(inputs) :],
        **tile.constants(),
        UPCAST=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **options,
    )


def target() -> int:
    """Compute capability of the current GPU, by Triton, which compiles what it asks with when it is asked first."""
    from triton.runtime import driver  # noqa: PLC0415 - asks for the GPU

    return int(driver.active.get_current_target().arch)
