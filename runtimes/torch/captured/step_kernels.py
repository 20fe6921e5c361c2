"""Triton kernels for what stands between a decode step's matrix products, attention apart.

Each is one launch where PyTorch takes several: at batch 1 a layer takes microseconds, and so does a launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl

from dlo_export.plugins.skip_down.kernel import skip_down_kernel
from dlo_export.plugins.skip_gate_up.kernel import skip_gate_up_kernel
from dlo_export.runtimes.torch.captured.early_start import let_next_start, wait_for_inputs


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
