"""Times work on a GPU by its own clock, and measures what the card can do at best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what a function launches, after two runs in which kernels are compiled and libraries initialised."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def block_us(run: Callable[[], object], runs: int) -> float:
    """Microseconds of the device per run, over so many runs in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / runs


def replay_us(step: Callable[[], object], *, blocks: int = 7, runs: int = 3) -> float:
    """Median microseconds of a step, captured and replayed."""
    graph = captured(step)
    block_us(graph.replay, runs)
    return float(np.median([block_us(graph.replay, runs) for _ in range(blocks)]))


def copy_gb_s(nbytes: int = 1 << 30) -> float:
    """Bandwidth of a copy within the device's memory, bytes read and written, 10⁹ per second."""
    source = torch.empty(nbytes // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / replay_us(lambda: target.copy_(source)) * 1e-3


def matmul_tflop_s(size: int = 8192) -> float:
    """Rate of a square bfloat16 matrix product, 10¹² operations per second."""
    left, right = (torch.empty(size, size, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    output = torch.empty_like(left)
    return 2 * size**3 / replay_us(lambda: torch.mm(left, right, out=output)) * 1e-6
