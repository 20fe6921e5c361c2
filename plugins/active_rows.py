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
    nothing has to be allocated or read by the host. Decisions become bits of 32-bit words: to find the words of ROWS
    ranks, and the bits within them, costs a 32nd of comparing every rank with every token.

    Args:
        scale: Pointer to float32 [tokens]; a token is active iff its value is not 0 (NaN is active, -0 is not).
        tokens: Number of tokens.
        first_rank: Rank, among the active tokens, of the tile's first row.
        ROWS: Rows of the tile.
        SCAN: Tokens read at a time; a multiple of 32.

    Returns:
        int32 [ROWS] of token indices (0 in unused rows), and how many active tokens there are from `first_rank` on:
        at most 0 when the tile has nothing to do, more than ROWS when later tiles have work too.
    """
    words: tl.constexpr = SCAN // 32
    word = tl.arange(0, words)
    bit = tl.arange(0, 32)[None, :]
    index = tl.zeros([ROWS], tl.int32)
    rank = first_rank + tl.arange(0, ROWS)  # among the tokens not scanned yet
    before = tl.zeros([], tl.int32)
    for start in range(0, tokens, SCAN):
        token = start + 32 * word[:, None] + bit
        active = tl.load(scale + token, mask=token < tokens, other=0.0) != 0.0
        bits = tl.sum(active.to(tl.uint32) << bit.to(tl.uint32), axis=1)
        counts = tl.sum(active.to(tl.int32), axis=1)
        # A rank lies in the first word whose running count exceeds it, behind all words whose count does not.
        behind = tl.cumsum(counts, 0)[None, :] <= rank[:, None]
        which = tl.sum(behind.to(tl.int32), axis=1)
        within = rank - tl.sum(tl.where(behind, counts[None, :], 0), axis=1)
        own_bits = tl.sum(tl.where(word[None, :] == which[:, None], bits[None, :], 0), axis=1)
        found = (rank >= 0) & (which < words)
        index += tl.where(found, start + 32 * which + _nth_bit(own_bits, within), 0)
        scanned = tl.sum(counts, axis=0)
        rank -= scanned
        before += scanned
    return index, before - first_rank


@triton.jit
def _nth_bit(bits, n):
    """Position of the set bit that n set bits lie below; by halves, each taken or left by what it counts."""
    position = tl.zeros_like(n)
    for step in tl.static_range(5):
        lower = _count(bits & ((1 << (16 >> step)) - 1))
        above = n >= lower
        n = tl.where(above, n - lower, n)
        bits = tl.where(above, bits >> (16 >> step), bits)
        position = tl.where(above, position + (16 >> step), position)
    return position


@triton.jit
def _count(bits):
    """How many of at most 16 bits are set: sums of pairs, fours, eights, both bytes."""
    bits = (bits & 0x5555) + ((bits >> 1) & 0x5555)
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits & 0x0F0F) + ((bits >> 4) & 0x0F0F)
    return ((bits & 0xFF) + (bits >> 8)).to(tl.int32)
