"""Time that is kept: each piece of work says what it will take, and one that does not fit is left out by name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.papers.results import Results


class Budget:
    """Time up to a moment.

    Args:
        end: The moment, on the monotonic clock.
    """

    def __init__(self, end: float) -> None:
        self._end = end

    @property
    def left(self) -> float:
        """Seconds that are left, less than 0 once they are over."""
        return self._end - time.monotonic()

    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0


@dataclass(frozen=True)
class Piece:
    """A piece of work, whose result is kept.

    Attributes:
        name: Of its result.
        seconds: About how long it takes; asked just before.
        make: Does it; None where time ran out on the way.
        needs: Results that must be there.
        afterwards: Called once the result is kept.
    """

    name: str
    seconds: Callable[[], float]
    make: Callable[[], Mapping[str, Any] | None]
    needs: tuple[str, ...] = ()
    afterwards: Callable[[], None] = lambda: None


def run_pieces(pieces: Sequence[Piece], results: Results, budget: Budget) -> dict[str, str]:
    """Does what is not there yet, in order, as far as time goes.

    Args:
        pieces: By falling importance; those that others need come before these.
        results: Where results are kept.
        budget: What must not be exceeded.

    Returns:
        By name, why a piece was left out.
    """
    left_out: dict[str, str] = {}
    for piece in pieces:
        if piece.name in results:
            continue
        if missing := [name for name in piece.needs if name not in results]:
            left_out[piece.name] = f"needs {', '.join(missing)}"
            continue
        seconds = piece.seconds()
        if seconds > budget.left:
            left_out[piece.name] = f"would take {seconds:.0f} s, {max(0.0, budget.left):.0f} s are left"
            continue
        start = time.monotonic()
        values = piece.make()
        taken = time.monotonic() - start
        if values is None:
            left_out[piece.name] = f"was stopped after {taken:.0f} s: the time was over"
            continue
        results.save(piece.name, {**values, "seconds": round(taken, 2)})
        piece.afterwards()
        print(f"{piece.name}: {taken:.1f} s, {budget.left:.0f} s left", file=sys.stderr, flush=True)
    return left_out
