"""Whether an artefact is what its description says: its files by hashes, graphs by structure, parity by its report."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_ONNX
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.checkpoints.interface import layers_with, parse_past, past_active_name
from dlo_export.checkpoints.model_types import leaves_keys
from dlo_export.checkpoints.router_thresholds import ONE_HALF, thresholds_json
from dlo_export.exporter.artefact_description import interface
from dlo_export.exporter.model_metadata import INJECTED_LAYERS
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.weight_file import external_tensors
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS, Target, Workload
from dlo_export.graph_passes.lowerings.registry import NOTHING_ROUTED, find_lowering, lowering_names
from dlo_export.graph_passes.spec.provenance import PASS_KEY
from dlo_export.runtimes.artefact.description import (
    MODEL_NAME,
    PARITY_NAME,
    ArtefactDescription,
    load_description,
    verify_description,
)
from dlo_export.runtimes.artefact.engine_record import EngineRecord, GraphInterface
from dlo_export.runtimes.artefact.files import verify_files
from dlo_export.runtimes.decoder_interface import TensorSpec
from dlo_export.runtimes.errors import ModelLoadError


def open_description(folder: Path) -> ArtefactDescription:
    """Reads an artefact's description and checks that the artefact is the one it describes.

    Args:
        folder: The artefact.

    Raises:
        InputError: The folder is no artefact, fields are missing, wrong or changed, files were changed, or a graph or
            parity.json is not the described one; naming every field or file.
    """
    description = load_description(folder)
    verify_files(description.files)
    records: list[tuple[str, Path, ArtefactDescription | EngineRecord, Target]] = [
        ("", folder / MODEL_NAME, description, PROVIDER_TARGETS[description.provider])
    ]
    records += [(f"engines[{index}].", each.graph, each, "tensorrt") for index, each in enumerate(description.engines)]
    problems: list[str] = []
    files: set[Path] = set()
    for prefix, path, record, target in records:
        model = load_graph(path)
        problems += graph_problems(model, record, description, prefix, path, target)
        files |= {path, *_data_files(model, path.parent)}
    # A file that nobody vouches for was not verified. Weights may be left out, but not be there unlisted.
    listed = {file.name for file in description.files}
    problems += [f"files does not list {path.relative_to(folder)}" for path in sorted(files - listed) if path.exists()]
    if (report := parity_report(folder)) is not None and report.get("verdict") != description.parity.verdict:
        problems.append(f"parity.verdict is {description.parity.verdict}, {PARITY_NAME} says {report.get('verdict')!r}")
    if problems:
        raise ModelLoadError(
            f"{folder}: its description contradicts its files:" + "".join(f"\n  {problem}" for problem in problems),
            hint="export the model again: dlo_artifact.json is not to be edited",
        )
    # Last, because what contradicts a file is named by its field above; this finds what no file tells.
    verify_description(folder)
    return description


def parity_report(folder: Path) -> dict[str, Any] | None:
    """What parity.json says; None where it is not there, as without parity, or where its reader threw it away.

    Raises:
        ModelLoadError: It is no JSON object.
    """
    path = folder / PARITY_NAME
    return read_json(path, ModelLoadError) if path.is_file() else None


def _data_files(model: ir.Model, folder: Path) -> set[Path]:
    return {folder / tensor.location for tensor in external_tensors(model.graph).values()}


def graph_problems(
    model: ir.Model,
    record: ArtefactDescription | EngineRecord,
    description: ArtefactDescription,
    prefix: str,
    path: Path,
    target: Target,
) -> Iterator[str]:
    """What of a description a graph contradicts; its weights are not read.

    Args:
        model: The graph.
        record: What says its dtype, lowering and interface.
        description: What says its layers.
        prefix: Of the record's fields.
        path: Of the graph, for messages.
        target: What the graph was lowered for.
    """
    found = interface(model.graph)
    yield from _interface_problems(found, record.interface, prefix, path)
    if (dtype := _weight_dtype(model)) != record.dtype:
        yield f"{prefix}dtype is {record.dtype}, most weights of {path.name} are {dtype}"
    layers = {cache.layer for spec in found.inputs if (cache := parse_past(spec.name)) is not None}
    if len(layers) != len(description.layers):
        yield f"layers has {len(description.layers)} entries, {path.name} has {len(layers)} decoder layers"
    routed = tuple(find_routers(model.graph))
    if routed != description.routed_layers:
        yield f"routing.layers are {list(description.routed_layers)}, {path.name} routes {list(routed)}"
    if (compared := compared_thresholds(model.graph)) != dict(description.router_thresholds):
        said = thresholds_json(description.router_thresholds)
        yield f"routing.router_thresholds are {said}, {path.name} compares with {thresholds_json(compared)}"
    remembering = layers_with((spec.name for spec in found.inputs), past_active_name("{i}"))
    if description.routing is not None and leaves_keys(description.routing.kind) == bool(remembering):
        states = f"{'' if remembering else 'no '}inputs {past_active_name('{i}')}"
        yield f"routing.kind is {description.routing.kind}, {path.name} has {states}"
    injected = " ".join(str(layer.index) for layer in description.layers if layer.injected)
    if (noted := model.metadata_props.get(INJECTED_LAYERS, injected)) != injected:
        yield f"layers are marked as injected: {injected or 'none'}, {path.name} has {noted or 'none'}"
    yield from _lowering_problems(model, record, prefix, path, target)
    if plugin_operators(model) != record.plugin_operators:
        yield (
            f"{prefix}plugin_operators are {list(record.plugin_operators)}, {path.name} has "
            f"{list(plugin_operators(model))}"
        )


def compared_thresholds(graph: ir.Graph) -> dict[int, float]:
    """What a graph compares its routers' scores with, where that is not one half; NaN where it cannot be told."""
    found = {layer: router.threshold for layer, router in find_routers(graph).items()}
    known = {layer: math.nan if threshold is None else threshold for layer, threshold in found.items()}
    return {layer: threshold for layer, threshold in known.items() if threshold != ONE_HALF}


def _weight_dtype(model: ir.Model) -> str | None:
    """The type of most of the weights' bytes, as `--dtype` calls it: routers, norms and constants may have others.

    Codes of quantised weights are of no type to compute in: their scales say it.
    """
    sizes: collections.Counter[str | None] = collections.Counter()
    for value in model.graph.initializers.values():
        if (tensor := value.const_value) is not None and tensor.dtype.is_floating_point():
            sizes[BY_ONNX[word].option if (word := tensor.dtype.name.lower()) in BY_ONNX else word] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _lowering_problems(
    model: ir.Model, record: ArtefactDescription | EngineRecord, prefix: str, path: Path, target: Target
) -> Iterator[str]:
    """A lowering is known by the tags its pass left on the nodes it made."""
    passes = {name: _pass_name(name, target) for name in (*lowering_names(target), NOTHING_ROUTED)}
    if record.lowering not in passes:
        yield f"{prefix}lowering is {record.lowering}, expected one of {', '.join(passes)}"
        return
    tags = {node.metadata_props.get(PASS_KEY) for node in model.graph.all_nodes()}
    found = [name for name, made_by in passes.items() if made_by is not None and made_by in tags]
    expected = [record.lowering] if passes[record.lowering] is not None else []
    if found != expected:
        yield f"{prefix}lowering is {record.lowering}, {path.name} has {' and '.join(found) or 'no lowered layers'}"
    not_capturable = find_lowering(record.lowering, target).why_not_captured(model.graph)
    if (record.capture_problem is None) != (not_capturable is None):  # in whatever words
        yield f"{prefix}capture_problem is {record.capture_problem}, expected {not_capturable} for {record.lowering}"


def _pass_name(lowering: str, target: Target) -> str | None:
    """Of the pass that makes a lowering; None where the masked form stays as it is."""
    make_pass = find_lowering(lowering, target).make_pass
    return None if make_pass is None else type(make_pass(Workload())).__name__


def _interface_problems(found: GraphInterface, said: GraphInterface, prefix: str, path: Path) -> Iterator[str]:
    sides: list[tuple[str, Sequence[TensorSpec], Sequence[TensorSpec]]] = [
        ("inputs", found.inputs, said.inputs),
        ("outputs", found.outputs, said.outputs),
    ]
    for side, have, want in sides:
        if have == want:
            continue
        have_by_name, want_by_name = {spec.name: spec for spec in have}, {spec.name: spec for spec in want}
        different = [n for n in have_by_name | want_by_name if have_by_name.get(n) != want_by_name.get(n)]
        first = different[0] if different else "their order"
        yield f"{prefix}interface.{side} are not those of {path.name}: {first} differs"
