"""The Triton kernel of `dlo::RouterScores`: one launch, no workspace."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def router_scores_kernel(  # noqa: PLR0913, PLR0917 - one argument per operand, size and tile constant
    hidden_states,
    router_weight,
    tokens,
    hidden,
    columns,
    scores,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCAN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program m: the score of token m. Sums, product and sigmoid are float32 whatever T is.

    Args:
        hidden_states: Pointer to T [tokens, hidden].
        router_weight: Pointer to float32 [hidden, 1].
        tokens: batch · sequence, and the number of programs.
        hidden: A multiple of 8 when compiled ahead of time.
        columns: Of the weight: 1.
        scores: Pointer to float32 [tokens].
        ROWS: 1.
        COLUMNS: 1.
        DEPTH: Elements of hidden per step.
        SCAN: Not used.
        UPCAST: Not used.
    """
    token = tl.program_id(0)
    depth = tl.arange(0, DEPTH)
    parts = tl.zeros([DEPTH], tl.float32)
    row = hidden_states + token.to(tl.int64) * hidden
    for start in range(0, hidden, DEPTH):
        used = start + depth < hidden
        x = tl.load(row + start + depth, mask=used, other=0.0).to(tl.float32)
        parts += x * tl.load(router_weight + start + depth, mask=used, other=0.0)
    tl.store(scores + token, tl.sigmoid(tl.sum(parts, axis=0)))
