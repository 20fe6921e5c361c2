"""Does a skipped MLP take no time? Two tables of layer durations, everything active and nothing active, tell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from benchmarks.gpu_subject import LayerSeconds, Phase

# Nodes are named after their decoder layer, and a runtime's layers after the nodes they were fused from.
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\b")
MOST = 0.1  # of the time it takes when active
LAUNCH_SECONDS = 4e-6  # an empty kernel's; a skipped layer still launches its kernels

Verdict = Literal["PASS", "FAIL", "NOT RUN"]


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """One routed layer's MLP.

    Attributes:
        layer: Decoder layer.
        active: Seconds when all tokens are active.
        skipped: Seconds when none is.
        kernels: The runtime's layers that take this time.
    """

    layer: int
    active: float
    skipped: float
    kernels: int

    @property
    def allowed(self) -> float:
        """Seconds that count as no time."""
        return MOST * self.active + LAUNCH_SECONDS * self.kernels

    def judge(self) -> Verdict:
        """NOT RUN where its time does not show, or so little of it that launches hide it."""
        if self.active <= 2 * self.allowed:
            return "NOT RUN"
        return "PASS" if self.skipped <= self.allowed else "FAIL"


@dataclasses.dataclass(frozen=True)
class SkipProof:
    """The outcome for one phase of one artefact; true iff every routed layer passes.

    Attributes:
        phase: "prefill" or "decode".
        layers: One per routed layer.
        unattributed: Share of the active step spent in layers that name no one routed MLP: attention, head, norms, and
            whatever was fused across layers.
    """

    phase: Phase
    layers: tuple[SkippedLayer, ...]
    unattributed: float

    @property
    def verdict(self) -> Verdict:
        """FAIL if a layer fails; NOT RUN if of a layer too little shows, or there are none."""
        verdicts = {layer.judge() for layer in self.layers}
        if "FAIL" in verdicts:
            return "FAIL"
        return "PASS" if verdicts == {"PASS"} else "NOT RUN"

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    @property
    def reason(self) -> str:
        """What stands behind the verdict."""
        if not self.layers:
            return "nothing is routed"
        judged = [(layer, layer.judge()) for layer in self.layers]
        if hidden := [layer.layer for layer, _ in judged if not layer.active]:
            return f"no runtime layer is named after the MLPs of layers {hidden}: build with layer names"
        if small := [layer.layer for layer, verdict in judged if verdict == "NOT RUN"]:
            return f"the MLPs of layers {small} take too little time to tell it from launches: larger model or batch"
        worst = max(self.layers, key=lambda layer: layer.skipped / layer.active)
        return (
            f"worst layer {worst.layer}: {worst.skipped * 1e6:.1f} µs skipped, {worst.active * 1e6:.1f} µs active, "
            f"allowed {worst.allowed * 1e6:.1f} µs"
        )

    def to_json(self) -> dict[str, Any]:
        """For the JSON line."""
        layers = [dataclasses.asdict(layer) | {"verdict": layer.judge()} for layer in self.layers]
        values = {"phase": self.phase, "verdict": self.verdict, "reason": self.reason}
        return values | {"unattributed": round(self.unattributed, 4), "layers": layers}


def skip_proof(phase: Phase, active: LayerSeconds, skipped: LayerSeconds, routed_layers: Sequence[int]) -> SkipProof:
    """Compares a step with everything active to one with nothing active.

    Args:
        phase: Of both.
        active: Seconds by the runtime's layer name.
        skipped: The same.
        routed_layers: Which MLPs to look at.
    """
    spent, saved = _by_decoder_layer(active), _by_decoder_layer(skipped)
    layers = []
    for layer in routed_layers:
        kernels = spent.get(layer, {})
        layers.append(SkippedLayer(layer, sum(kernels.values()), sum(saved.get(layer, {}).values()), len(kernels)))
    total = sum(active.values())
    attributed = sum(layer.active for layer in layers)
    return SkipProof(phase, tuple(layers), 1 - attributed / total if total else 1.0)


def _by_decoder_layer(seconds: LayerSeconds) -> dict[int, dict[str, float]]:
    """Times by decoder layer and name; what is fused from several layers' MLPs belongs to none."""
    found: dict[int, dict[str, float]] = {}
    for name, duration in seconds.items():
        layers = {int(number) for number in _MLP.findall(name)}
        if len(layers) == 1:
            found.setdefault(layers.pop(), {})[name] = duration
    return found


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """One number per layer, from one per step."""
    ordered = {name: sorted(values) for name, values in samples.items() if values}
    return {name: values[len(values) // 2] for name, values in ordered.items()}
