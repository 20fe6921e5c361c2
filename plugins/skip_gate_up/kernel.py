"""The Triton kernel of `dlo::SkipGateUp`: one launch, no workspace, nothing read by the host."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl

from dlo_export.plugins.active_rows import active_rows


@triton.jit
def skip_gate_up_kernel(  # noqa: PLR0913, PLR0917 - one argument per operand, size and tile constant
    hidden_states,
    scale,
    gate_weight,
    up_weight,
    tokens,
    hidden,
    intermediate,
    gated,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCAN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (m, n): columns n·COLUMNS… of the active tokens ranked m·ROWS….

    Arguments stand as TensorRT's quick-deploy plugins pass them: inputs, integers, outputs. Row tiles vary fastest, so
    that programs that run together read the same weights.

    Args:
        hidden_states: Pointer to T [tokens, hidden].
        scale: Pointer to float32 [tokens].
        gate_weight: Pointer to T [hidden, intermediate].
        up_weight: Pointer to T [hidden, intermediate].
        tokens: batch · sequence.
        hidden: A multiple of 8 when compiled ahead of time.
        intermediate: A multiple of 8 when compiled ahead of time.
        gated: Pointer to T [tokens, intermediate]; rows of skipped tokens are not written.
        ROWS: Tokens of a tile.
        COLUMNS: Columns of a tile.
        DEPTH: Elements of hidden per step.
        SCAN: Tokens read at a time while looking for active ones.
        UPCAST: Convert operands to float32 before multiplying: for Triton's interpreter, which computes bfloat16
            wrongly. On a GPU T goes to the tensor cores as it is; sums are float32 either way.
    """
    index, remaining = active_rows(scale, tokens, tl.program_id(0) * ROWS, ROWS, SCAN)
    if remaining <= 0:
        return
    # A tile has fewer active tokens, and fewer columns, than it has room for at the end: what is beyond is masked.
    row_used = (tl.arange(0, ROWS) < remaining)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    column_used = column < intermediate
    depth = tl.arange(0, DEPTH)
    rows = index.to(tl.int64)[:, None]  # 32 bits do not reach the end of a long batch of wide rows
    x_tile = hidden_states + rows * hidden + depth[None, :]
    weight_offset = depth[:, None] * intermediate + column
    gate_tile = gate_weight + weight_offset
    up_tile = up_weight + weight_offset
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Both products in one sweep over the rows of x, which are gathered once: no copy of them is ever written.
    for start in range(0, hidden, DEPTH):
        depth_used = start + depth < hidden
        weight_used = depth_used[:, None] & column_used
        x = tl.load(x_tile, mask=row_used & depth_used[None, :], other=0.0)
        gate_block = tl.load(gate_tile, mask=weight_used, other=0.0)
        up_block = tl.load(up_tile, mask=weight_used, other=0.0)
        if UPCAST:
            x, gate_block, up_block = x.to(tl.float32), gate_block.to(tl.float32), up_block.to(tl.float32)
        gate = tl.dot(x, gate_block, gate, input_precision="ieee")
        up = tl.dot(x, up_block, up, input_precision="ieee")
        x_tile += DEPTH
        gate_tile += DEPTH * intermediate
        up_tile += DEPTH * intermediate
    # SiLU in float32, rounded once; scattered back to the tokens' own rows.
    result = gate * tl.sigmoid(gate) * up
    tl.store(gated + rows * intermediate + column, result.to(gated.dtype.element_ty), mask=row_used & column_used)
