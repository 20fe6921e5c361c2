"""Does a skipped MLP take no time? Two tables of layer durations, everything active and nothing active, tell.

Where the runtime names its layers after the graph's nodes, every routed MLP is looked at by itself. TensorRT may fuse
whole decoder layers and name the result as it likes; then the step as a whole must get shorter by what the MLPs are of
the work: a decode step reads every weight once, so their share of the weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir

from benchmarks.engines.gpu_subject import LayerSeconds, Phase
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD

# Nodes are named after their decoder layer, and a runtime's layers after the nodes they were fused from.
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\b")
MOST = 0.1  # of the time it takes when active
LEAST_SAVED = 0.75  # of the MLPs' share of the step
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
class WholeStep:
    """All layers of the runtime together.

    Attributes:
        active: Seconds when all tokens are active.
        skipped: Seconds when none is.
        kernels: The runtime's layers.
        mlp_share: Of the routed MLPs, in the weights a step reads.
    """

    active: float
    skipped: float
    kernels: int
    mlp_share: float

    @property
    def saved(self) -> float:
        """Share of the step that skipping saves."""
        return 1 - self.skipped / self.active if self.active else 0.0

    def summary(self) -> str:
        """What was measured."""
        return (
            f"the whole step takes {self.skipped * 1e6:.1f} µs skipped, {self.active * 1e6:.1f} µs active: "
            f"{self.saved:.0%} saved, the MLPs are {self.mlp_share:.0%} of the weights"
        )

    def judge(self) -> Verdict:
        """NOT RUN where launches may be most of it."""
        if self.active <= 2 * LAUNCH_SECONDS * self.kernels:
            return "NOT RUN"
        return "PASS" if self.saved >= LEAST_SAVED * self.mlp_share else "FAIL"


@dataclasses.dataclass(frozen=True)
class SkipProof:
    """The outcome for one phase of one artefact; true iff it passes.

    Attributes:
        phase: "prefill" or "decode".
        layers: One per routed layer.
        whole: The step.
    """

    phase: Phase
    layers: tuple[SkippedLayer, ...]
    whole: WholeStep

    @property
    def unattributed(self) -> float:
        """Share of the active step in layers that name no one routed MLP: attention, head, what was fused across."""
        return 1 - sum(layer.active for layer in self.layers) / self.whole.active if self.whole.active else 1.0

    @property
    def hidden(self) -> list[int]:
        """Routed layers after whose MLP no layer of the runtime is named."""
        return [layer.layer for layer in self.layers if not layer.active]

    @property
    def verdict(self) -> Verdict:
        """FAIL if a layer fails; the whole step's where layers are hidden; NOT RUN if too little shows."""
        verdicts = {layer.judge() for layer in self.layers}
        if "FAIL" in verdicts:
            return "FAIL"
        if self.hidden:
            return self.whole.judge()
        return "PASS" if verdicts == {"PASS"} else "NOT RUN"

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    @property
    def reason(self) -> str:
        """What stands behind the verdict."""
        if not self.layers:
            return "nothing is routed"
        named = [layer for layer in self.layers if layer.active]
        failed = [layer for layer in named if layer.judge() == "FAIL"]
        if self.hidden and not failed:
            return f"no layer of the runtime is named after the MLPs of layers {self.hidden}; {self.whole.summary()}"
        small = [layer.layer for layer in named if layer.judge() == "NOT RUN"]
        if small and not failed:
            return f"the MLPs of layers {small} take too little time to tell it from launches: larger model or batch"
        worst = max(named, key=lambda layer: layer.skipped / layer.active)
        return (
            f"worst layer {worst.layer}: {worst.skipped * 1e6:.1f} µs skipped, {worst.active * 1e6:.1f} µs active, "
            f"allowed {worst.allowed * 1e6:.1f} µs"
        )

    def to_json(self) -> dict[str, Any]:
        """For the JSON line."""
        layers = [dataclasses.asdict(layer) | {"verdict": layer.judge()} for layer in self.layers]
        values = {"phase": self.phase, "verdict": self.verdict, "reason": self.reason, "layers": layers}
        return values | {"unattributed": round(self.unattributed, 4), "step": dataclasses.asdict(self.whole)}


def skip_proof(
    phase: Phase, active: LayerSeconds, skipped: LayerSeconds, routed_layers: Sequence[int], mlp_share: float
) -> SkipProof:
    """Compares a step with everything active to one with nothing active.

    Args:
        phase: Of both.
        active: Seconds by the runtime's layer name.
        skipped: The same.
        routed_layers: Which MLPs to look at.
        mlp_share: Of their weights, in those a step reads.
    """
    spent, saved = _by_decoder_layer(active), _by_decoder_layer(skipped)
    layers = []
    for layer in routed_layers:
        kernels = spent.get(layer, {})
        layers.append(SkippedLayer(layer, sum(kernels.values()), sum(saved.get(layer, {}).values()), len(kernels)))
    whole = WholeStep(sum(active.values()), sum(skipped.values()), len(active), mlp_share)
    return SkipProof(phase, tuple(layers), whole)


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


def mlp_share(model: ir.Model, routed_layers: Sequence[int]) -> float:
    """Share of the routed MLPs in the weights a decode step reads.

    Args:
        model: Its initializers are named as in a checkpoint.
        routed_layers: Whose MLPs.
    """
    initializers = model.graph.initializers
    sizes = {name: value.const_value.nbytes for name, value in initializers.items() if value.const_value is not None}
    if HEAD in sizes:
        sizes.pop(EMBEDDING, None)  # rows of it; a tied one is the head, and read whole
    found = {name: _MLP.match(name) for name in sizes}
    mlps = sum(size for name, size in sizes.items() if (match := found[name]) and int(match[1]) in routed_layers)
    return mlps / sum(sizes.values())
