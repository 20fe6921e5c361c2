"""Skip efficiency of a decode step on a GPU: how much of the time that skipping could save it does save.

Efficiency is (T_dense / T - 1) / (T_dense / T_ideal - 1), as on a CPU (`benchmarks.skip_efficiency`). What T_ideal is
there are three answers to, and every decoder gives all of them:

* **removed**: what the same dense model takes, in the same runtime, without those MLPs (and their norms) and without
  routers, measured. Nobody who decides at run time can do better than a model that never had them. The bar is judged
  by this one, which is what the CPU's figures are judged by.
* **proportional**: T_dense times the share of the step's bytes that are still read. The strictest: it asks what
  remains, attention and its small launches, to be as close to the memory's rate as the large products that went.
* **copied**: T_dense less what the card copies the unread bytes in. The mildest where the dense products are slower
  than a copy: the time that skipping saves of those is more than that.
"""

from __future__ import annotations

import dataclasses

BAR = 0.9
"""What `Efficiency.removed` is held to where half of the MLPs of an 8B are skipped at batch 1."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """One step's.

    Attributes:
        removed: By the model without those MLPs; None where it was not measured, or took no less than the dense one.
        proportional: By the bytes that are still read.
        copied: By the bytes that are not, at the rate of a copy.
        unknown: Why an answer is None though there was an ideal: by it, nothing was to be saved.
    """

    removed: float | None
    proportional: float | None
    copied: float | None
    unknown: str | None = None

    @property
    def passed(self) -> bool | None:
        """Whether it holds the bar; None where what it is judged by is not known."""
        return None if self.removed is None else self.removed >= BAR

    @property
    def facts(self) -> dict[str, float | str | None]:
        """For a row."""
        answers = {"removed": self.removed, "proportional": self.proportional, "copied": self.copied}
        figures: dict[str, float | str | None] = {
            f"efficiency_{name}": None if value is None else round(value, 3) for name, value in answers.items()
        }
        return figures | ({} if self.unknown is None else {"efficiency_unknown": self.unknown})


def skip_efficiency(
    dense_ms: float,
    step_ms: float,
    *,
    dense_bytes: float,
    unread_bytes: float,
    copy_rate: float,
    removed_ms: float | None,
) -> Efficiency:
    """Of a step that skips something.

    Args:
        dense_ms: Of the dense decoder's step, in the same runtime and run.
        step_ms: Of the step that skips.
        dense_bytes: That the dense step reads at least: weights but the embedding's, and the cache.
        unread_bytes: Of the weights that the step skips; more than 0.
        copy_rate: Bytes per second, read and written, of a large copy on this card; `benchmarks.gpu.copy_rate`.
        removed_ms: Of the dense model's step without the MLPs that are skipped, None where it was not measured.
    """
    proportional_ms = dense_ms * (1 - unread_bytes / dense_bytes)
    # A read moves a byte once, a copy twice: the rate counts both, so that a byte read costs one byte of it.
    copied_ms = dense_ms - unread_bytes / copy_rate * 1e3

    ideals = {"removed": removed_ms, "proportional": proportional_ms, "copied": copied_ms}
    found = {
        name: None if ideal is None or ideal >= dense_ms else (dense_ms / step_ms - 1) / (dense_ms / ideal - 1)
        for name, ideal in ideals.items()
    }
    # Two measurements of nearly the same may come out equal, or the wrong way round: no share of that is known.
    nothing = [f"{name} {ideal:.4g} ms" for name, ideal in ideals.items() if ideal is not None and ideal >= dense_ms]
    unknown = f"nothing to save of the dense step's {dense_ms:.4g} ms: {', '.join(nothing)}" if nothing else None
    return Efficiency(**found, unknown=unknown)
