"""dlo_artifact.json: an artefact's description of itself.

The exporter fills an `ArtefactDescription`, everybody reads one; both through this module.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.files.written_files import ARTEFACT_FILE
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.runtimes.artefact.engine_record import (
    Count,
    EngineRecord,
    FloatOption,
    GraphInterface,
    LoweringDescription,
    ParityVerdict,
    Sha256,
)
from dlo_export.runtimes.artefact.typed_json import JsonProblemsError, Rule, from_json, to_json
from dlo_export.runtimes.errors import ModelLoadError

FORMAT_VERSION = 5  # 3 says each router's threshold, 4 what model.onnx is to run on, 5 which data are the source's
FILE_NAME = ARTEFACT_FILE
MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
ADDED_NAME = "dlo_added.data"  # of new weights, where the source's own have that name
ENGINES_NAME = "engines"
PARITY_NAME = "parity.json"

# The last field of dlo_artifact.json: a hash of all others.
_CONTENT = "content_sha256"

_REWRITE = "export the model again, or use the dlo-export that wrote it"


# Whether an adapter's base_sha256 is the base's: equal; another one, allowed by --force-base; the adapter has none; the
# base is a graph, whose bytes are others than its checkpoint's, or its weights were not read.
AdapterBase = Literal["same", "forced", "not stated", "not comparable"]


@dataclasses.dataclass(frozen=True)
class SourceIdentity:
    """What the artefact was made from.

    Attributes:
        kind: Of source, such as "gguf".
        name: Of its file or folder.
        sha256: Of its weights; with a LoRA adapter, of both files' hashes; None where no weights were read.
        model_type: What its config.json calls the model, such as "mistral"; None where a graph lies without one.
        adapter: Name of the adapter's folder; None where there was none.
        adapter_base: Whether the adapter was made from these weights; None where there was none.
        removed_layers: Of the source, deepened by its adapter: layers that pass everything on and are in no graph.
    """

    kind: str
    name: str
    sha256: str | None
    model_type: str | None
    adapter: str | None = None
    adapter_base: AdapterBase | None = None
    removed_layers: tuple[Count, ...] = ()


@dataclasses.dataclass(frozen=True)
class ArtefactFile:
    """A file whose content the description vouches for.

    Attributes:
        name: Where it lies.
        bytes: Its size.
        sha256: Of its content.
    """

    name: Path
    bytes: Count
    sha256: Sha256


# As a copy, as one that shares the source's blocks on the disk, or as the source's own file under a second name.
KeptHow = Literal["copy", "reflink", "hard link"]


@dataclasses.dataclass(frozen=True)
class KeptData:
    """A data file that stands here as it stood beside the graph the artefact was made from, byte for byte.

    Attributes:
        name: Where it lies; under the same name there.
        how: It came here.
        unused_bytes: What model.onnx does not read of it.
    """

    name: Path
    how: KeptHow
    unused_bytes: Count


Score = Annotated[float, Rule("a score above 0 and below 1", lambda score: 0 < score < 1)]


@dataclasses.dataclass(frozen=True)
class RoutingDescription:
    """How tokens skip layers.

    Attributes:
        kind: What a token skips.
        rule: What decides, in words.
        layers: Which are routed, ascending.
        rescale_hidden_states: Whether the output of what is skipped is scaled.
        scale_factor: By how much, in the DLO authors' terms.
        scale_gap: Likewise.
        router_thresholds: By layer, the score an active token exceeds, where it is not 0.5.
    """

    kind: RoutingKind
    rule: str
    layers: tuple[Count, ...]
    rescale_hidden_states: bool
    scale_factor: float
    scale_gap: float
    router_thresholds: Mapping[int, Score]


@dataclasses.dataclass(frozen=True)
class LayerDescription:
    """One decoder layer.

    Attributes:
        index: In the deepened model.
        injected: Whether it was added to the original model.
        source: The original layer it was made from; None where there is none.
        init: How it was initialised; None where it was not.
        routed: Whether tokens skip it.
        identity: Whether it changes nothing; None where no weights were read.
    """

    index: Count
    injected: bool
    source: Count | None
    init: str | None
    routed: bool
    identity: bool | None


Layers = Annotated[
    tuple[LayerDescription, ...],
    Rule("layers numbered from 0 on", lambda layers: [layer.index for layer in layers] == list(range(len(layers)))),
]


@dataclasses.dataclass(frozen=True)
class ArtefactDescription(LoweringDescription):
    """Everything dlo_artifact.json says; the lowering is that of model.onnx.

    Attributes:
        format_version: Of this form.
        tools: Versions of what wrote it, by name.
        source: What it was made from.
        files: Graphs, weights and engines. Others (configuration, tokenizer) are the user's to edit.
        kept_data: Those of the weights that are the source's own files.
        dtype: "fp32", "fp16" or "bf16", of model.onnx: weights, KV cache and logits.
        provider: Of ONNX Runtime, "cpu" or "cuda": what model.onnx was made for, and runs on unless told otherwise.
        routing: None where nothing is routed.
        layers: In order.
        interface: Of model.onnx.
        engines: Empty without --trt.
        parity: Of model.onnx and of the engines' graphs.
    """

    format_version: int
    tools: Mapping[str, str]
    source: SourceIdentity
    files: tuple[ArtefactFile, ...]
    kept_data: tuple[KeptData, ...]
    dtype: FloatOption
    provider: ProviderOption
    routing: RoutingDescription | None
    layers: Layers
    interface: GraphInterface
    engines: tuple[EngineRecord, ...]
    parity: ParityVerdict

    @property
    def router_thresholds(self) -> Mapping[int, float]:
        """By routed layer, where it is not 0.5."""
        return {} if self.routing is None else self.routing.router_thresholds

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of routed layers, ascending."""
        return () if self.routing is None else self.routing.layers


def save_description(description: ArtefactDescription, folder: Path) -> None:
    """Writes dlo_artifact.json."""
    save_json(folder / FILE_NAME, description_json(description, folder))


def description_json(description: ArtefactDescription, folder: Path) -> dict[str, Any]:
    """What dlo_artifact.json holds, a hash of it included.

    Args:
        description: Of the artefact.
        folder: The artefact.
    """
    # The version first, for whoever reads the file to know what to expect of the rest.
    values = {"format_version": description.format_version, **to_json(description, folder)}
    return values | {_CONTENT: content_sha256(values)}


def load_description(folder: Path) -> ArtefactDescription:
    """Reads an artefact's dlo_artifact.json. Whether its files are those described, `verify_files` says.

    Raises:
        ModelLoadError: The folder is no artefact, the file is not JSON, or of another format; or fields are missing or
            wrong, with all of them.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ModelLoadError(f"{folder}: has no {FILE_NAME}", hint="give a folder that dlo-export wrote")
    values = read_json(path, ModelLoadError)
    if (found := values.get("format_version")) != FORMAT_VERSION or isinstance(found, bool):
        shown = f"is {found}" if isinstance(found, int) else "is missing or no whole number"
        raise ModelLoadError(f"{path}: format_version {shown}, this version reads {FORMAT_VERSION}", hint=_REWRITE)
    try:
        description = from_json(ArtefactDescription, values, folder)
    except JsonProblemsError as err:
        raise ModelLoadError(f"{path}: {_listed(err.problems)}", hint=_REWRITE) from err
    if problems := list(_contradictions(description)):
        raise ModelLoadError(f"{path}: {_listed(problems)}", hint=_REWRITE)
    return description


def verify_description(folder: Path) -> None:
    """Compares what dlo_artifact.json says with the hash of it that it ends with.

    That finds accidents and edits. It is no signature: who edits the file can write another hash into it too.

    Args:
        folder: An artefact whose description can be read.

    Raises:
        ModelLoadError: A field was changed since it was written, or there is no hash.
    """
    path = folder / FILE_NAME
    values = read_json(path, ModelLoadError)
    said, found = values.get(_CONTENT), content_sha256(values)
    if said != found:
        shown = f"is {said[:12]}…" if isinstance(said, str) else "is missing or no text"
        raise ModelLoadError(
            f"{path}: was changed since it was written: {_CONTENT} {shown}, its fields have {found[:12]}…",
            hint="copy the artefact again, or export the model again: it is not to be edited",
        )


def content_sha256(values: Mapping[str, Any]) -> str:
    """Of a description's fields and their values but the hash itself, in whatever order and layout a file has them.

    Args:
        values: As read.
    """
    others = {name: value for name, value in values.items() if name != _CONTENT}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def kept_data_summary(description: ArtefactDescription, folder: Path) -> str | None:
    """Which data files are the source's own, in a line; None where there are none.

    Args:
        description: Of the artefact.
        folder: The artefact.
    """
    kept = description.kept_data
    if not kept:
        return None
    sizes = {file.name: file.bytes for file in description.files}
    names = ", ".join(file.name.relative_to(folder).as_posix() for file in kept)
    ways = " and ".join(sorted({file.how for file in kept}))
    unused, total = sum(file.unused_bytes for file in kept), sum(sizes[file.name] for file in kept)
    return f"kept as the source has them ({ways}): {names}; {unused / 2**20:.2f} of {total / 2**20:.2f} MB are not read"


def mean_active_rates(description: ArtefactDescription, rates: Mapping[int, float]) -> dict[str, float | None]:
    """Share of tokens whose MLP runs, averaged over the original and over the injected layers.

    Args:
        description: Of the artefact.
        rates: By routed layer; a layer without router is always active.

    Returns:
        By "original" and "injected"; None where there are no such layers.
    """
    kinds: dict[str, list[float]] = {"original": [], "injected": []}
    for layer in description.layers:
        kinds["injected" if layer.injected else "original"].append(rates.get(layer.index, 1.0))
    return {kind: sum(values) / len(values) if values else None for kind, values in kinds.items()}


def _contradictions(description: ArtefactDescription) -> Iterator[str]:
    """Fields that do not agree with each other."""
    marked = tuple(layer.index for layer in description.layers if layer.routed)
    if marked != description.routed_layers:
        yield f"routing.layers are {list(description.routed_layers)}, but layers are marked as routed: {list(marked)}"
    if unrouted := sorted(description.router_thresholds.keys() - set(description.routed_layers)):
        yield f"routing.router_thresholds names layers {unrouted}, which are not routed"
    for name, record in (("", description), *((f"engines[{i}].", e) for i, e in enumerate(description.engines))):
        if (record.lowering == "none") != (description.routing is None):
            yield f"{name}lowering is {record.lowering}, but routing is {'not ' if description.routing else ''}null"
    listed = {file.name for file in description.files}
    for index, kept in enumerate(description.kept_data):
        if kept.name not in listed:
            yield f"kept_data[{index}].name is {kept.name.name}, which files does not list"
    for index, engine in enumerate(description.engines):
        for field in ("file", "graph"):
            if getattr(engine, field) not in listed:
                yield f"engines[{index}].{field} is {getattr(engine, field).name}, which files does not list"


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else "".join(f"\n  {problem}" for problem in problems)
