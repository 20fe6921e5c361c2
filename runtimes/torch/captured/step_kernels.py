"""Triton kernels for what stands between a decode step's matrix products.

Each is one launch where PyTorch takes several: at batch 1 a layer takes microseconds, and so does a launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlo_export.plugins.skip_down.kernel import skip_down_kernel
from dlo_export.plugins.skip_gate_up.kernel import skip_gate_up_kernel


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Lets the next kernel start as soon as all programs of this one have, to do what stands before its own wait.

    Args:
        EARLY: See `wait_for_inputs`.
    """
    if EARLY == 2:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Waits until the kernel before is done, where this one was started earlier (programmatic dependent launch).

    Every kernel waits before it is done, so whoever has waited for one has waited for all before it. Before its wait a
    kernel may read what no kernel of a step writes, weights and earlier tokens' keys and values, and write nothing.

    Args:
        EARLY: 0 where kernels start one after the other; 1 where the next may start once this one's inputs are there, 2
            where it may from this one's start on. Either takes compute capability 9.0.
    """
    if EARLY > 0:
        gdc_wait()
    if EARLY == 1:
        gdc_launch_dependents()


@triton.jit(do_not_specialize_on_alignment=["threshold"])  # one of a vector of them
def add_norm_kernel(  # noqa: PLR0913, PLR0917 - one argument per operand, size and constant
    stream,
    added,
    weight,
    router,
    threshold,
    summed,
    normed,
    scores,
    scale,
    hidden,
    epsilon,
    offset,
    slope,
    ADDS: tl.constexpr,
    ROUTES: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token): adds a branch to the stream, normalises the sum, and lets a router decide from it.

    Args:
        stream: Pointer to T [tokens, hidden].
        added: Pointer to T [tokens, hidden], where ADDS.
        weight: Pointer to T [hidden], of the RMS norm.
        router: Pointer to float32 [hidden], where ROUTES.
        threshold: Pointer to float32 [1], where ROUTES: what an active token's score exceeds.
        summed: Pointer to T [tokens, hidden], written where ADDS.
        normed: Pointer to T [tokens, hidden], written.
        scores: Pointer to float32 [tokens], written where ROUTES.
        scale: Pointer to float32 [tokens], written where ROUTES: offset + slope · score, 0 where the token skips.
        hidden: Width of the stream.
        epsilon: Of the norm.
        offset: See scale.
        slope: See scale.
        ADDS: Whether there is a branch to add.
        ROUTES: Whether there is a router.
        BLOCK: A power of two, at least `hidden`.
        EARLY: See `wait_for_inputs`.
    """
    row = tl.program_id(0)
    let_next_start(EARLY)
    column = tl.arange(0, BLOCK)
    used = column < hidden
    place = row.to(tl.int64) * hidden + column
    # Everything is on its way before anything is waited for.
    norm = tl.load(weight + column, mask=used, other=0.0).to(tl.float32)
    if ROUTES:
        direction, least = tl.load(router + column, mask=used, other=0.0), tl.load(threshold)
    wait_for_inputs(EARLY)
    x = tl.load(stream + place, mask=used, other=0.0)
    if ADDS:
        # Rounded before it is normalised: the next layer reads the stream as it is stored.
        x = (x.to(tl.float32) + tl.load(added + place, mask=used, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(summed + place, x, mask=used)
    wide = x.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / hidden + epsilon)
    # As transformers' norm rounds: before the weight and after it.
    even = (wide * factor).to(x.dtype).to(tl.float32)
    tl.store(normed + place, (even * norm).to(x.dtype), mask=used)
    if ROUTES:
        score = 1.0 / (1.0 + tl.exp(-tl.sum(wide * direction, axis=0)))
        tl.store(scores + row, score)
        tl.store(scale + row, tl.where(score > least, offset + slope * score, 0.0))


@triton.jit
def rotate_and_store_kernel(  # noqa: PLR0913, PLR0917
    qkv,
    start,
    cosines,
    sines,
    query,
    keys,
    values,
    sequence,
    heads,
    kv_heads,
    capacity,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, head of queries, keys or values): rotates by the position; keys and values go to the cache.

    Args:
        qkv: Pointer to T [tokens, (heads + 2 · kv_heads) · HEAD].
        start: Pointer to int64 [batch]: position and cache slot of each sequence's first token.
        cosines: Pointer to T [capacity, HEAD / 2].
        sines: Likewise.
        query: Pointer to T [tokens, heads, HEAD], written.
        keys: Pointer to T [batch, kv_heads, capacity, HEAD], written at the tokens' slots.
        values: Likewise.
        sequence: Tokens of each sequence.
        heads: Of queries.
        kv_heads: Of keys and of values.
        capacity: Slots of a sequence.
        HEAD: Width of a head.
        BLOCK: A power of two, at least HEAD / 2.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    sequence_index = token // sequence
    slot = tl.load(start + sequence_index) + token % sequence
    half = tl.arange(0, BLOCK)
    used = half < HEAD // 2
    source = qkv + (token.to(tl.int64) * (heads + 2 * kv_heads) + head) * HEAD + half
    first = tl.load(source, mask=used, other=0.0)
    second = tl.load(source + HEAD // 2, mask=used, other=0.0)
    if head < heads + kv_heads:
        cosine = tl.load(cosines + slot * (HEAD // 2) + half, mask=used, other=0.0).to(tl.float32)
        sine = tl.load(sines + slot * (HEAD // 2) + half, mask=used, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cosine - b * sine).to(first.dtype)
        second = (b * cosine + a * sine).to(second.dtype)
    if head < heads:
        target = query + (token.to(tl.int64) * heads + head) * HEAD + half
        tl.store(target, first, mask=used)
        tl.store(target + HEAD // 2, second, mask=used)
    else:
        pair = sequence_index.to(tl.int64) * kv_heads + (head - heads) % kv_heads
        place = (pair * capacity + slot) * HEAD + half
        if head < heads + kv_heads:
            tl.store(keys + place, first, mask=used)
            tl.store(keys + place + HEAD // 2, second, mask=used)
        else:
            tl.store(values + place, first, mask=used)
            tl.store(values + place + HEAD // 2, second, mask=used)


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


@triton.jit
def gate_kernel(gate_up, gated, intermediate, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Program (token, block of columns): silu(gate) · up.

    Args:
        gate_up: Pointer to T [tokens, 2 · intermediate].
        gated: Pointer to T [tokens, intermediate], written.
        intermediate: Inner width of the MLP.
        BLOCK: Columns of a program.
        EARLY: See `wait_for_inputs`.
    """
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = column < intermediate
    gate = tl.load(gate_up + row * 2 * intermediate + column, mask=used, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * intermediate + column, mask=used, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(gated + row * intermediate + column, result.to(gated.dtype.element_ty), mask=used)


@triton.jit
def vector_product_kernel(
    row,
    weight,
    depth,
    output,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (n): columns n · COLUMNS… of one token's product; their weights are read before the token is there.

    Args:
        row: Pointer to T [depth].
        weight: Pointer to T [columns, depth].
        depth: Of the sums.
        output: Pointer to T [columns], written.
        COLUMNS: Of a program; a divisor of all.
        BLOCK: A power of two, at least `depth`.
        EARLY: See `wait_for_inputs`.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    let_next_start(EARLY)
    inner = tl.arange(0, BLOCK)
    used = inner < depth
    weights = tl.load(weight + column.to(tl.int64)[:, None] * depth + inner[None, :], mask=used[None, :], other=0.0)
    wait_for_inputs(EARLY)
    x = tl.load(row + inner, mask=used, other=0.0).to(tl.float32)
    total = tl.sum(weights.to(tl.float32) * x[None, :], axis=1)
    tl.store(output + column, total.to(output.dtype.element_ty))


@triton.jit
def early_skip_gate_up_kernel(  # noqa: PLR0913, PLR0917
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
    EARLY: tl.constexpr,
):
    """`skip_gate_up_kernel`, arguments as there, that may be started early; see `wait_for_inputs`."""
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    sizes = (tokens, hidden, intermediate)
    skip_gate_up_kernel(hidden_states, scale, gate_weight, up_weight, *sizes, gated, ROWS, COLUMNS, DEPTH, SCAN, UPCAST)


@triton.jit
def early_skip_down_kernel(  # noqa: PLR0913, PLR0917
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
    EARLY: tl.constexpr,
):
    """`skip_down_kernel`, likewise."""
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    sizes = (tokens, intermediate, hidden)
    skip_down_kernel(gated, scale, down_weight, residual, *sizes, output, ROWS, COLUMNS, DEPTH, SCAN, UPCAST)
