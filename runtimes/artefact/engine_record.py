"""What is known of a built TensorRT engine: an entry of `engines` in dlo_artifact.json.

An `EngineBuild` is what one build made, wherever the engine lies (the engine cache keeps it as it is); an
`EngineRecord` is an engine in an artefact: what it was built for, and its build.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.runtimes.artefact.name_ranges import collapse, expand
from dlo_export.runtimes.artefact.typed_json import Form, Rule
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.parity.verdict import Verdict

BackendName = Literal["rtx", "tensorrt"]
# What described a graph's plugins to the builder: the C++ library, Python twins without kernels (TensorRT-RTX), or
# quick-deploy plugins, whose kernels are in the engine (TensorRT).
PluginSource = Literal["none", "library", "twins", "quick-deploy"]
Phase = Literal["both", "prefill", "decode"]
Shape = tuple[int, ...]

_FLOAT_OPTIONS = [kind.option for kind in FLOATS]
Count = Annotated[int, Rule("0 or more", lambda value: value >= 0)]
Size = Annotated[int, Rule("1 or more", lambda value: value >= 1)]
Name = Annotated[str, Rule("a name", bool)]
Target = Annotated[str, Rule('such as "sm89"', lambda text: text[:2] == "sm" and text[2:].isdigit())]
Sha256 = Annotated[
    str, Rule("64 hexadecimal digits", lambda text: len(text) == 64 and set(text) <= set("0123456789abcdef"))
]
FloatOption = Annotated[str, Rule(f"one of {', '.join(map(str, _FLOAT_OPTIONS))}", lambda text: text in _FLOAT_OPTIONS)]


def _collapsed_specs(values: Any) -> Any:
    entries = collapse((value["name"], {"dtype": value["dtype"], "shape": value["shape"]}) for value in values)
    return [{"name": name, **rest} for name, rest in entries]


def _expanded_specs(values: Any) -> Any:
    if not isinstance(values, list) or not all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in values):
        return values
    return [{**value, "name": name} for name, value in expand((value["name"], value) for value in values)]


Specs = Annotated[tuple[TensorSpec, ...], Form(_collapsed_specs, _expanded_specs)]


@dataclasses.dataclass(frozen=True)
class GraphInterface:
    """A graph's inputs and outputs, in order.

    Attributes:
        inputs: The file has the cache's in one entry (`name_ranges`).
        outputs: Likewise.
    """

    inputs: Specs
    outputs: Specs


@dataclasses.dataclass(frozen=True)
class ParityVerdict:
    """How a comparison with the PyTorch reference ended.

    Attributes:
        verdict: Of the parity report.
        reason: Why it was not run; None where there is nothing to say.
    """

    verdict: Verdict
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class LoweringDescription:
    """What routed layers of a graph became, and what a runtime must know of it.

    Attributes:
        lowering: "none" where nothing is routed.
        lowering_reason: Why that one.
        capture_problem: Why its steps cannot be captured in a CUDA graph; None where they can.
        plugin_operators: Operators that no runtime has by itself, such as "dlo::SkipDown": running them needs the
            plugin library, unless the engine carries their kernels.
    """

    lowering: Name
    lowering_reason: str
    capture_problem: str | None
    plugin_operators: tuple[str, ...]


InputShapes = Annotated[
    Mapping[str, tuple[Shape, Shape, Shape]],
    Form(
        lambda shapes: dict(collapse(shapes.items())),
        lambda shapes: dict(expand(shapes.items())) if isinstance(shapes, dict) else shapes,
    ),
    Rule(
        "three shapes of one rank per input",
        lambda shapes: all(len({len(shape) for shape in sizes}) == 1 for sizes in shapes.values()),
    ),
]


@dataclasses.dataclass(frozen=True)
class OptimizationProfile:
    """Shapes an engine accepts, and those it is tuned for.

    Attributes:
        name: "prefill" or "decode".
        shapes: By input: the least, the optimal and the largest shape. The file has the cache's in one entry.
    """

    name: Name
    shapes: InputShapes


Profiles = Annotated[tuple[OptimizationProfile, ...], Rule("at least one profile", bool)]


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What a stage of a build took.

    Attributes:
        name: "import", "parse", "checks", "build" or "write".
        seconds: Wall time.
        peak_bytes: Largest resident memory of the building process during the stage.
    """

    name: str
    seconds: float
    peak_bytes: Count


@dataclasses.dataclass(frozen=True)
class LayerCensus:
    """Layers of the parsed network by type, before the builder fuses any.

    Attributes:
        total: Number of layers by TensorRT's type name.
        skipping: By routed decoder layer: the layers that carry its skip mechanism.
    """

    total: Mapping[str, Count]
    skipping: Mapping[int, Mapping[str, Count]]


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """What a build made.

    Attributes:
        backend: Who built it.
        version: Of the backend; engines run only in the version that built them.
        targets: GPUs it is for, such as "sm89"; empty: every GPU from sm80 on.
        plugins: What described the plugins to the builder. An engine built with the library or with twins needs the
            library to run.
        plugin_library_sha256: Of the library, where one was loaded.
        bytes: Size of the engine.
        sha256: Of the engine.
        stages: In order; of the original build, where the engine was copied from the cache.
        census: Layers of the network.
        decomposed_attentions: Attentions the builder was allowed to take apart.
        checks: Checks the network passed.
        cache_key: Of the engine cache.
        from_cache: Whether the engine was copied from there.
    """

    backend: BackendName
    version: str
    targets: tuple[Target, ...]
    plugins: PluginSource
    plugin_library_sha256: Sha256 | None
    bytes: Count
    sha256: Sha256
    stages: tuple[StageCost, ...]
    census: LayerCensus
    decomposed_attentions: Count
    checks: tuple[str, ...]
    cache_key: Sha256
    from_cache: bool

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory of the building process."""
        return max((stage.peak_bytes for stage in self.stages), default=0)


@dataclasses.dataclass(frozen=True)
class EngineRecord(LoweringDescription):
    """An engine of an artefact.

    Attributes:
        file: The engine.
        graph: The .onnx it was built from.
        phase: What it runs; together, an artefact's engines are one model.
        dtype: "fp16", "bf16" or "fp32", of weights, KV cache and logits.
        cache: "static": a fixed number of slots, updated in place; "growing": ONNX Runtime's interface.
        max_batch: Sequences per step at most.
        max_sequence: Tokens per sequence and step at most.
        max_cache: Tokens per sequence in the cache at most.
        last_logits: Whether `logits` is of each sequence's last token only.
        backend_reason: Why that backend built it.
        profiles: In the engine's order.
        interface: Of graph and engine.
        float32_nodes: Why some nodes compute in float32, by kind.
        float16_stream_peak: Largest magnitude measured in the residual stream; None where it was not measured.
        parity: Of the engine itself, which only a GPU runs.
        build: What building it made.
    """

    file: Path
    graph: Path
    phase: Phase
    dtype: FloatOption
    cache: Literal["static", "growing"]
    max_batch: Size
    max_sequence: Size
    max_cache: Size
    last_logits: bool
    backend_reason: str
    profiles: Profiles
    interface: GraphInterface
    float32_nodes: Mapping[str, str]
    float16_stream_peak: float | None
    parity: ParityVerdict
    build: EngineBuild

    @functools.cached_property
    def static_cache(self) -> DecoderInterface:
        """The interface as runners read it.

        Raises:
            ModelInterfaceError: It is no decoder with a static cache (--trt-cache static).
        """
        return DecoderInterface.of(self.interface.inputs, self.interface.outputs, self.file.name, cache="static")
