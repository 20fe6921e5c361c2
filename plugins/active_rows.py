"""Which tokens a row tile works on: the device-side selection both kernels share."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def active_rows(scale, tokens, first_rank, ROWS: tl.constexpr, SCAN: tl.constexpr):
    """Token indices of the active tokens ranked `first_rank` to `first_rank + ROWS - 1`.

    Every program scans the whole scale vector by itself: at 4 bytes a token that is cheaper than a second launch, and
    nothing has to be allocated or read by the host.

    Args:
        scale: Pointer to float32 [tokens]; a token is active iff its value is not 0 (NaN is active, -0 is not).
        tokens: Number of tokens.
        first_rank: Rank, among the active tokens, of the tile's first row.
        ROWS: Rows of the tile.
        SCAN: Tokens read at a time.

    Returns:
        int32 [ROWS] of token indices (0 in unused rows), and how many active tokens there are from `first_rank` on:
        at most 0 when the tile has nothing to do, more than ROWS when later tiles have work too.
    """
    row = tl.arange(0, ROWS)
    index = tl.zeros([ROWS], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(0, tokens, SCAN):
        token = start + tl.arange(0, SCAN)
        active = (tl.load(scale + token, mask=token < tokens, other=0.0) != 0.0).to(tl.int32)
        # an exclusive running count, so that an active token's entry is its rank
        rank = before + tl.cumsum(active, 0) - active - first_rank
        chosen = (rank[None, :] == row[:, None]) & (active[None, :] != 0)
        index += tl.sum(tl.where(chosen, token[None, :], 0), axis=1)
        before += tl.sum(active, axis=0)
    return index, before - first_rank
