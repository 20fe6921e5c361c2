"""How far a candidate may be from the reference: one table."""

from __future__ import annotations

import dataclasses
import math

# How far that may widen the table. A model that needs more amplifies rounding to where a wrong one would pass as well.
MOST_WIDENED = 10


@dataclasses.dataclass(frozen=True)
class OwnError:
    """How far PyTorch itself is off under the same decisions: in float32 against float64, in 16 bits against float32.

    Attributes:
        mean: Of its logits, as `Tolerance.mean` counts.
        largest: Of its logits, as `Tolerance.largest` counts.
        score: Largest of its routers' scores.
        score_mean: Mean of them.
        score_layer: Median of those of the layer that is off most.
        compared: What was compared with what, in words for a report.
    """

    mean: float
    largest: float
    score: float
    score_mean: float = 0.0
    score_layer: float = 0.0
    compared: str = "its own fp32 is off float64"


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Of one dtype.

    A token's differences are measured against its largest reference logit (at least 1), its peak. Single tokens may be
    ill-conditioned: rounding that is 1e-6 of the peak on average is 100 times that for them. So the mean is held tight,
    where a systematic error shows, and the largest one loosely, where a wrong position, mask or cache row still does.

    Attributes:
        mean: Mean absolute difference of all logits, relative to the mean peak.
        largest: Largest absolute difference of a logit, relative to its token's peak.
        score_layer: Median absolute difference of a layer's router scores. Where an output is another layer's, or a
            router is off and decides alike, most of them differ; an ill-conditioned token moves no median.
        score: Largest absolute difference of a score; loose, since such a token's may be anywhere.
        margin: A decision may flip where the reference's |score - threshold| is at most this: a near-tie.
        own_errors: How often PyTorch's own error a candidate may be off where the table fails it.
        why: What was measured.
    """

    mean: float
    largest: float
    score_layer: float
    score: float
    margin: float
    own_errors: int
    why: str

    def widened(self, own: OwnError, *, limit: float = MOST_WIDENED) -> Tolerance:
        """What a candidate is allowed where PyTorch itself is off by `own`: `own_errors` times that.

        Args:
            own: What was measured; what is not finite allows nothing.
            limit: How many times the table's values at most.
        """

        def wider(allowed: float, error: float) -> float:
            return max(allowed, min(self.own_errors * error, limit * allowed)) if math.isfinite(error) else allowed

        return dataclasses.replace(
            self,
            mean=wider(self.mean, own.mean),
            largest=wider(self.largest, own.largest),
            score_layer=wider(self.score_layer, own.score_layer),
            score=wider(self.score, own.score),
            margin=wider(self.margin, own.score),
        )


# Measured on SmolLM2-135M (30 layers; its residual stream reaches 23,000) against PyTorch in float32: as it is, and at
# its worst-conditioned, with routers that skip half of the MLPs at random. PyTorch in float64 differs from PyTorch in
# float32 by as much as ONNX Runtime does.
# Own errors: two independent roundings add up, and single tokens vary; 16 bits vary less, for how much they are off.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(
        mean=1e-5,
        largest=5e-4,
        score_layer=1e-5,
        score=2e-2,
        margin=1e-4,
        own_errors=4,
        why="mean 3e-7 (half skipped: 5e-6), largest 4e-6 (1.3e-4), scores 9e-6 (4.5e-5), a layer's mean 1e-6 (1.2e-6)",
    ),
    "fp16": Tolerance(
        mean=8e-3,
        largest=0.15,
        score_layer=8e-3,
        score=0.2,
        margin=2e-2,
        own_errors=2,
        why="mean 5e-4 (half skipped: 6e-3), largest 5e-3 (0.11), scores 1e-2 (4e-2), a layer's mean 1.9e-3 (2.5e-3)",
    ),
    "bf16": Tolerance(
        mean=2e-2,
        largest=0.4,
        score_layer=5e-2,
        score=0.5,
        margin=0.1,
        own_errors=2,
        why="mean 4e-3 (half skipped: 3e-2), largest 5e-2 (over 1), scores 7e-2 (0.3), a layer's mean 2.8e-2 (1.9e-2)",
    ),
}

EIGHT_BIT_ACTIVATIONS = dataclasses.replace(
    TOLERANCES["fp16"],
    why="on kernels that sum other numbers of rows otherwise (AVX2): tiny models' mean 4e-5, largest 9e-3; "
    "SmolLM2-135M's 2.5e-3, 6e-2 (half skipped: 5e-3, 0.13), which the rounding itself moves by 1.3e-2, 0.26 (3.6e-2, "
    "0.5)",
)
"""Of float32 graphs whose products round to 8 bits what they multiply; those that do not round show the rest.

Where two forms of a graph differ by an ulp in front of a product, one of them may be rounded the other way, by 1/127 of
the largest of its block. A model that amplifies that is judged by its own error: what the rounding makes of its masked
form.
"""
