"""Triton kernel of a decode step's attention to a cache of fixed size, its slots split among programs."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl

from dlo_export.runtimes.torch.captured.early_start import let_next_start, wait_for_inputs


@triton.jit
def rotated_head(head, half_place, cosines, sines, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Heads turned by a rotary embedding, rounded to T, in which it is stored.

    Args:
        head: Pointers to T, the first element of each head, [n, 1].
        half_place: Offset of the position in the tables.
        cosines: Pointer to T [capacity, HEAD / 2].
        sines: Likewise.
        HEAD: Width of a head.
        WIDTH: A power of two, at least HEAD.

    Returns:
        T [n, WIDTH].
    """
    column = tl.arange(0, WIDTH)
    used = column < HEAD
    half = column % (HEAD // 2)
    # Each half is turned with the other one, which stands HEAD / 2 further on or back.
    other = tl.where(column < HEAD // 2, column + HEAD // 2, column - HEAD // 2)
    sign = tl.where(column < HEAD // 2, -1.0, 1.0)
    cosine = tl.load(cosines + half_place + half, mask=used, other=0.0).to(tl.float32)
    sine = tl.load(sines + half_place + half, mask=used, other=0.0).to(tl.float32) * sign
    own = tl.load(head + column[None, :], mask=used[None, :], other=0.0)
    opposite = tl.load(head + other[None, :], mask=used[None, :], other=0.0)
    turned = own.to(tl.float32) * cosine[None, :] + opposite.to(tl.float32) * sine[None, :]
    return turned.to(own.dtype)


@triton.jit
def attended_block(q, k, v, seen, peak, total, result, scaling):
    """Attention to one more block of slots.

    Args:
        q: T [rows, width].
        k: T [width, slots].
        v: T [slots, width].
        seen: bool [slots], which are in use: at least one.
        peak: float32 [rows], the largest score so far, which weights are relative to.
        total: float32 [rows], the weights' sum so far.
        result: float32 [rows, width], the sum of weighted values so far.
        scaling: Of the scores.

    Returns:
        The new peak, total and result.
    """
    score = tl.where(seen[None, :], tl.dot(q, k, input_precision="ieee") * scaling, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, axis=1))
    fading = tl.exp(peak - higher)
    weight = tl.exp(score - higher[:, None])
    total = total * fading + tl.sum(weight, axis=1)
    result = result * fading[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return higher, total, result


@triton.jit
def joined_splits(  # noqa: PLR0913, PLR0917
    parts,
    peaks,
    totals,
    used,
    row_used,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What the splits found, joined in their order; one without slots has a weight of 0.

    Everything is read where other multiprocessors' stores are seen, past the cache of this one.

    Args:
        parts: Pointers to float32 [ROWS, WIDTH], the first split's; the next one's stand HEAD further on.
        peaks: Pointers to float32 [ROWS], likewise; the next one's stand 1 further on.
        totals: Likewise.
        used: bool [ROWS, WIDTH].
        row_used: bool [ROWS].
        HEAD: Width of a head.
        ROWS: Query heads.
        WIDTH: A power of two, at least HEAD.
        SPLITS: How many.

    Returns:
        float32 [ROWS, WIDTH].
    """
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for index in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(peaks + index, mask=row_used, other=0.0, cache_modifier=".cg"))
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(peaks + index, mask=row_used, other=0.0, cache_modifier=".cg") - top)
        total += weight * tl.load(totals + index, mask=row_used, other=1.0, cache_modifier=".cg")
        part = tl.load(parts + index * HEAD, mask=used, other=0.0, cache_modifier=".cg")
        result += weight[:, None] * part
    return result / total[:, None]


@triton.jit
def attend_kernel(  # noqa: PLR0913, PLR0915, PLR0917
    qkv,
    start,
    cosines,
    sines,
    keys,
    values,
    partial,
    peaks,
    totals,
    arrived,
    attended,
    scaling,
    kv_heads,
    capacity,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (sequence and key head, split): one token's attention to a share of the slots that are in use.

    Splitting the slots gives every multiprocessor work at batch 1 (flash decoding). The first split takes the token's
    own key and value besides and stores them; the last one to arrive joins what all of them found.

    Args:
        qkv: Pointer to T [batch, (GROUP + 2) · kv_heads · HEAD], not rotated.
        start: Pointer to int64 [batch]: the token's position and slot, behind the ones in use.
        cosines: Pointer to T [capacity, HEAD / 2].
        sines: Likewise.
        keys: Pointer to T [batch, kv_heads, capacity, HEAD], written at the token's slot.
        values: Likewise.
        partial: Pointer to float32 [batch, heads, SPLITS, HEAD], for sums of weighted values.
        peaks: Pointer to float32 [batch, heads, SPLITS], for the largest scores, which weights are relative to.
        totals: Likewise, for the sums of weights.
        arrived: Pointer to int32 [batch, kv_heads], zeros before and after.
        attended: Pointer to T [batch, heads, HEAD], written.
        scaling: Of the scores.
        kv_heads: Of keys and of values.
        capacity: Slots of a sequence.
        GROUP: Query heads of a key head.
        ROWS: GROUP, and at least the 16 of a tensor core instruction.
        HEAD: Width of a head.
        WIDTH: A power of two, at least HEAD.
        BLOCK: Slots at a time.
        SPLITS: Programs that share a sequence's slots.
        EARLY: See `wait_for_inputs`.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    let_next_start(EARLY)
    sequence, kv_head = pair // kv_heads, pair % kv_heads
    length = tl.load(start + sequence).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), 16) * 16
    last = tl.minimum((split + 1) * share, length)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row_used, column_used = row < GROUP, column < HEAD
    # Rows beyond the group repeat its last one, so that nothing has to be masked.
    token, cached = qkv + sequence.to(tl.int64) * (GROUP + 2) * kv_heads * HEAD, pair.to(tl.int64) * capacity * HEAD
    group_head = kv_head * GROUP + tl.minimum(row, GROUP - 1)[:, None]
    half_place = length * (HEAD // 2)
    first = split * share
    key_tile = keys + cached + column[:, None]
    value_tile = values + cached + column[None, :]
    # Earlier tokens' keys and values are there since the last step: on their way before the query is waited for.
    slot = first + tl.arange(0, BLOCK)
    seen = slot < last
    k = tl.load(key_tile + slot[None, :] * HEAD, mask=seen[None, :] & column_used[:, None], other=0.0)
    v = tl.load(value_tile + slot[:, None] * HEAD, mask=seen[:, None] & column_used[None, :], other=0.0)
    wait_for_inputs(EARLY)
    q = rotated_head(token + group_head * HEAD, half_place, cosines, sines, HEAD, WIDTH)
    peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    if split == 0:
        own_head = token + ((GROUP * kv_heads + kv_head) + tl.zeros([1, 1], tl.int32)) * HEAD
        own_key = rotated_head(own_head, half_place, cosines, sines, HEAD, WIDTH)
        own_value = tl.load(own_head + kv_heads * HEAD + column[None, :], mask=column_used[None, :], other=0.0)
        own_place = cached + length * HEAD + column[None, :]
        tl.store(keys + own_place, own_key, mask=column_used[None, :])
        tl.store(values + own_place, own_value, mask=column_used[None, :])
        peak = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), axis=1) * scaling
        total += 1.0
        result = tl.broadcast_to(own_value.to(tl.float32), [ROWS, WIDTH])
    if first < last:  # a block has a slot in use, so no peak stays infinite
        peak, total, result = attended_block(q, k, v, seen, peak, total, result, scaling)
    for begin in range(first + BLOCK, last, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        seen = slot < last
        k = tl.load(key_tile + slot[None, :] * HEAD, mask=seen[None, :] & column_used[:, None], other=0.0)
        v = tl.load(value_tile + slot[:, None] * HEAD, mask=seen[:, None] & column_used[None, :], other=0.0)
        peak, total, result = attended_block(q, k, v, seen, peak, total, result, scaling)
    head, used = pair * GROUP + row, row_used[:, None] & column_used[None, :]
    target = attended + head[:, None] * HEAD + column[None, :]
    if SPLITS == 1:
        tl.store(target, (result / total[:, None]).to(attended.dtype.element_ty), mask=used)
    else:
        place = head * SPLITS
        parts = partial + place[:, None] * HEAD + column[None, :]
        tl.store(peaks + place + split, peak, mask=row_used)
        tl.store(totals + place + split, total, mask=row_used)
        tl.store(parts + split * HEAD, result, mask=used)
        # All threads' stores come before one thread's count, which releases them to whom it tells that all are there.
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(arrived + pair, 0)
            joined = joined_splits(parts, peaks + place, totals + place, used, row_used, HEAD, ROWS, WIDTH, SPLITS)
            tl.store(target, joined.to(attended.dtype.element_ty), mask=used)
