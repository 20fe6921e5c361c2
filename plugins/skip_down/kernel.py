"""The Triton kernel of `dlo::SkipDown`: one launch, no workspace, nothing read by the host."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl

from dlo_export.plugins.active_rows import active_rows


@triton.jit
def skip_down_kernel(  # noqa: PLR0913, PLR0917 - one argument per operand, size and tile constant
    gated,
    scale,
    down_weight,
    residual,
    tokens,
    intermediate,
    hidden,
    output,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCAN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (m, n): columns n·COLUMNS… of the skipped tokens among tokens m·ROWS…, and of the active ones ranked so.

    Every token is skipped and lies in one token tile, or is active and has one rank: so every row of the output is
    written once, by one program of each column, whatever the others do.

    Args:
        gated: Pointer to T [tokens, intermediate]; rows of skipped tokens are not read.
        scale: Pointer to float32 [tokens].
        down_weight: Pointer to T [intermediate, hidden].
        residual: Pointer to T [tokens, hidden].
        tokens: batch · sequence.
        intermediate: A multiple of 8 when compiled ahead of time.
        hidden: A multiple of 8 when compiled ahead of time.
        output: Pointer to T [tokens, hidden].
        ROWS: Tokens of a tile.
        COLUMNS: Columns of a tile.
        DEPTH: Elements of intermediate per step.
        SCAN: Tokens read at a time while looking for active ones.
        UPCAST: Convert operands to float32 before multiplying: for Triton's interpreter, which computes bfloat16
            wrongly. On a GPU T goes to the tensor cores as it is; sums are float32 either way.
    """
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    column_used = column < hidden

    # Skipped tokens: a copy, no arithmetic, so that NaN payloads and signed zeros survive. The residual is loaded
    # before it is known whose is needed: a step that skips all then does not wait for two loads one after the other.
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept_tile = token.to(tl.int64)[:, None] * hidden + column
    stream = tl.load(residual + kept_tile, mask=(token < tokens)[:, None] & column_used)
    skipped = tl.load(scale + token, mask=token < tokens, other=1.0) == 0.0
    tl.store(output + kept_tile, stream, mask=skipped[:, None] & column_used)

    # Active tokens: their rows are gathered, multiplied, and added to the stream at their own places.
    index, remaining = active_rows(scale, tokens, tl.program_id(0) * ROWS, ROWS, SCAN)
    if remaining <= 0:
        return
    row_used = tl.arange(0, ROWS) < remaining
    depth = tl.arange(0, DEPTH)
    rows = index.to(tl.int64)[:, None]
    gated_tile = gated + rows * intermediate + depth[None, :]
    down_tile = down_weight + depth[:, None] * hidden + column
    branch = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, intermediate, DEPTH):
        depth_used = start + depth < intermediate
        x = tl.load(gated_tile, mask=row_used[:, None] & depth_used[None, :], other=0.0)
        down_block = tl.load(down_tile, mask=depth_used[:, None] & column_used, other=0.0)
        if UPCAST:
            x, down_block = x.to(tl.float32), down_block.to(tl.float32)
        branch = tl.dot(x, down_block, branch, input_precision="ieee")
        gated_tile += DEPTH
        down_tile += DEPTH * hidden
    # The residual is added in float32, so that the sum is rounded once.
    factor = tl.load(scale + index, mask=row_used, other=0.0)
    output_tile = rows * hidden + column
    used = row_used[:, None] & column_used
    own_stream = tl.load(residual + output_tile, mask=used, other=0.0).to(tl.float32)
    result = own_stream + factor[:, None] * branch
    tl.store(output + output_tile, result.to(output.dtype.element_ty), mask=used)
