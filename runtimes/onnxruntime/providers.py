"""ONNX Runtime's execution providers, and what they cannot run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dlo_export.checkpoints.dtypes import BFLOAT16, FLOAT16, ElementType

SCATTER_ADD = "ScatterND(add)"
"""ScatterND with reduction "add": how compaction puts tokens back."""


@dataclass(frozen=True)
class Gap:
    """What a provider has no kernel for.

    Attributes:
        dtype: Of weights and activations.
        operator: Which operator lacks it; None: so many that no decoder runs.
        reason: What ONNX Runtime says to it, in words for a report.
    """

    dtype: ElementType
    operator: str | None
    reason: str


@dataclass(frozen=True)
class Provider:
    """An execution provider and its settings.

    Attributes:
        name: As ONNX Runtime calls it.
        options: Its own options, as `InferenceSession(provider_options=…)` takes them.
        gaps: What it cannot run; a test asks ONNX Runtime whether they are still there.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    gaps: tuple[Gap, ...] = ()

    def why_not_run(self, dtype: ElementType, operators: Collection[str] = ()) -> str | None:
        """Why a graph cannot run here; None where nothing is known against it.

        Args:
            dtype: Of its weights and activations.
            operators: Those in it that a gap may name.
        """
        reasons = (gap.reason for gap in self.gaps if gap.dtype == dtype and gap.operator in (None, *operators))
        return next(reasons, None)


# Measured with ONNX Runtime 1.32. Other float16 kernels that the CPU lacks, ONNX Runtime replaces by casts to float32.
CPU = Provider(
    "CPUExecutionProvider",
    gaps=(
        Gap(BFLOAT16, None, "ONNX Runtime's CPU provider does not implement bfloat16"),
        Gap(FLOAT16, SCATTER_ADD, "ONNX Runtime's CPU kernel of ScatterND does not add float16"),
    ),
)
