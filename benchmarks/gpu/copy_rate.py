"""What a device's memory gives: the ceiling of everything that reads weights."""

from __future__ import annotations

import statistics
import time

_BYTES = {"cuda": 2**32, "cpu": 2**23}


def copy_rate(device: str, copies: int) -> float:
    """Bytes read and written per second by a large copy on the device, the median.

    Not in a CUDA graph, where a copy is left to an engine that is slower than the SMs: 2.8 TB/s of 4.3 on an H200.

    Args:
        device: "cuda", or "cpu", whose copies are small and show only that this runs.
        copies: To take the median of; one more goes before them.
    """
    import torch  # noqa: PLC0415 - heavy

    source = torch.ones(_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(copies + 1):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1000)
        else:
            begin = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - begin)
    return 2 * source.numel() / statistics.median(seconds[1:])
