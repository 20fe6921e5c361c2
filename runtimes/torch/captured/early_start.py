"""How kernels of a step overlap: one starts before the one in front of it is done (programmatic dependent launch)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives a kernel's arguments their types; mypy sees none of it.
# ruff: noqa: N803 - compile-time integers are upper case in Triton's own kernels
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
