"""What a graph consists of: layers, bytes per part, operators."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import all_zeros
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER
from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.exporter.artefact_check import compared_thresholds, open_description, parity_report
from dlo_export.exporter.pipeline import prepare_released
from dlo_export.exporter.sources.foreign_graph import read_prepared
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.graph_passes.errors import DecoderLayersNotFound, GraphPassError
from dlo_export.graph_passes.find.data_flow import constant_tensor, consumed_values
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.find.layer_form import layer_form
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.graph_passes.spec.provenance import ORIGIN_KEY
from dlo_export.runtimes.artefact.description import FILE_NAME, MODEL_NAME, ArtefactDescription, description_json
from dlo_export.runtimes.artefact.files import has_weights
from dlo_export.runtimes.tensorrt.engine_check import obstacles
from dlo_export.runtimes.tensorrt.gpu import find_gpu


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `dlo inspect` reports.

    Attributes:
        path: The graph.
        ops: Count of every operator, subgraphs included, most frequent first.
        bytes: Of the weights by part: embedding and head, attention, MLP, routers, other.
        layers: Per decoder layer: index, injected, routed, identity (None where the graph alone does not tell), bytes,
            threshold: the score that an active token's exceeds, None where nothing is routed; attention and weights:
            how they are written, weights None where they cannot be told apart, and problem: why not, but of an
            artefact's routed layers, which our own passes have put into other forms.
        layers_problem: Why no layers were found; None where they were.
        description: dlo_artifact.json, where there is one.
        has_weights: Whether the weights' values are there, of an artefact; None of another graph.
        parity_report: The verdict in an artefact's parity.json; None where there is none.
        skips: What a token saves that skips: "nothing", its own part of what is skipped ("tokens"), or all of that in a
            step without an active token ("steps"); None where nothing is routed, or nothing says how.
        untrained_routers: Layers of an artefact that skip every token, because their routers are all zeros.
        engine_problems: Why engines cannot run on this machine; None where there are no engines.
    """

    path: Path
    ops: dict[str, int]
    bytes: dict[str, int]
    layers: list[dict[str, Any]]
    layers_problem: str | None
    description: ArtefactDescription | None
    has_weights: bool | None
    parity_report: str | None
    skips: str | None
    untrained_routers: list[int]
    engine_problems: list[str] | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        said = None if self.description is None else description_json(self.description, self.path.parent)
        shallow = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return shallow | {"path": str(self.path), "description": said}


def inspect_model(path: Path) -> Inspection:
    """Inspects an artefact folder, which must be whole, or any `.onnx` file, whose external weights need not be there.

    Raises:
        InputError: Neither; or the artefact is not the one its description describes.
    """
    graph_path = path / MODEL_NAME if path.is_dir() else path
    if not graph_path.is_file():
        raise InputError(
            f"{path}: no {MODEL_NAME} in it" if path.is_dir() else f"{path}: no such file",
            hint="give an artefact folder that dlo-export wrote, or a .onnx file",
        )
    is_artefact = graph_path.name == MODEL_NAME and (graph_path.parent / FILE_NAME).is_file()
    description = open_description(graph_path.parent) if is_artefact else None
    with_weights = None if description is None else has_weights(description, graph_path.parent)
    # Read twice: operators are counted in the graph as it is, layers found in one prepared for that.
    as_it_is = load_graph(graph_path)
    ops = collections.Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in as_it_is.graph.all_nodes()
    )
    if description is not None:
        model = prepare_released(as_it_is)
    else:
        model = read_prepared(graph_path, for_inspection=True).model
    try:
        routed = dict.fromkeys(find_routers(model.graph), ONE_HALF)
        layers, problem = find_decoder_layers(model.graph), None
    except DecoderLayersNotFound as err:
        layers, problem = (), str(err)
    except GraphPassError as err:  # what nodes say of themselves is damaged
        raise InputError(f"{graph_path}: {err.message}", hint=err.hint) from err
    thresholds = {**routed, **compared_thresholds(model.graph)}
    return Inspection(
        graph_path,
        dict(ops.most_common()),
        _bytes_by_part(model.graph, layers),
        [_layer_row(model.graph, layer, thresholds.get(layer.index), description) for layer in layers],
        problem,
        description,
        with_weights,
        _parity_verdict(description, graph_path.parent),
        _skips(description),
        _untrained_routers(model.graph, description) if with_weights else [],
        _engine_problems(description),
    )


def _parity_verdict(description: ArtefactDescription | None, folder: Path) -> str | None:
    report = None if description is None else parity_report(folder)
    return None if report is None else str(report["verdict"])  # the description's, or it would have been refused


def _skips(description: ArtefactDescription | None) -> str | None:
    if description is None or description.routing is None:
        return None
    return find_lowering(description.lowering, PROVIDER_TARGETS[description.provider]).skips


def _untrained_routers(graph: ir.Graph, description: ArtefactDescription | None) -> list[int]:
    """Those of an artefact, whose weights are there; where the layer is the identity, skipping loses nothing."""
    if description is None or description.routing is None:
        return []
    return [
        layer
        for layer, router in find_routers(graph).items()
        if not description.layers[layer].identity
        and description.router_thresholds.get(layer, ONE_HALF) >= ONE_HALF
        and (tensor := constant_tensor(router.weight)) is not None
        and not tensor.numpy().any()
    ]


def _engine_problems(description: ArtefactDescription | None) -> list[str] | None:
    if description is None or not description.engines:
        return None
    return [obstacle.reason for obstacle in obstacles(description.engines, find_gpu().target)]


def _layer_row(
    graph: ir.Graph, layer: DecoderLayer, threshold: float | None, description: ArtefactDescription | None
) -> dict[str, Any]:
    """What is said of a layer; its router's threshold is None where it has none."""
    said = None if description is None else description.layers[layer.index]
    injected, form = any(node.metadata_props.get(ORIGIN_KEY) for node in layer.nodes), layer_form(layer)
    if said is not None and threshold is not None:
        form = dataclasses.replace(form, problem=None)
    return {
        "index": layer.index,
        "injected": injected if said is None else said.injected,
        "routed": threshold is not None,
        "threshold": threshold,
        "identity": _is_identity(layer) if said is None else said.identity,
        "bytes": sum(_weight_bytes(graph, layer.nodes).values()),
        **dataclasses.asdict(form),
    }


def _is_identity(layer: DecoderLayer) -> bool | None:
    """Whether both branches end in zeros; None where the projections cannot be told, or their data file not be read."""
    try:
        projections = layer.projections.values()
    except GraphPassError:
        return None
    ends = [projection.contents for projection in projections if projection.tensor in LLAMA_LAYER.branch_ends]
    try:
        return all(map(all_zeros, ends))
    except (OSError, ValueError):  # of a file that is not there, is too short, or lies where onnx_ir reads none
        return None


def _bytes_by_part(graph: ir.Graph, layers: tuple[DecoderLayer, ...]) -> dict[str, int]:
    routers = _bytes_of(graph, (router.weight for router in find_routers(graph).values()))
    read = {
        "attention": _weight_bytes(graph, [node for layer in layers for node in layer.attention.nodes]),
        "mlp": _weight_bytes(graph, [node for layer in layers for node in layer.mlp.nodes]),
    }
    parts = {
        part: {name: size for name, size in weights.items() if name not in routers} for part, weights in read.items()
    }
    parts["routers"] = routers
    total = {
        name: value.const_value.nbytes for name, value in graph.initializers.items() if value.const_value is not None
    }
    named = {name for weights in parts.values() for name in weights}
    rest = {name: size for name, size in total.items() if name not in named}
    matrices = {name for name in rest if len(graph.initializers[name].shape or ()) == 2}
    sizes = {part: sum(weights.values()) for part, weights in parts.items()}
    sizes["embedding and head"] = sum(rest[name] for name in matrices)
    sizes["other"] = sum(size for name, size in rest.items() if name not in matrices)
    return sizes


def _weight_bytes(graph: ir.Graph, nodes: Iterable[ir.Node]) -> dict[str, int]:
    """Initializers the nodes read, by name."""
    return _bytes_of(graph, (value for node in nodes for value in consumed_values(node)))


def _bytes_of(graph: ir.Graph, values: Iterable[ir.Value | None]) -> dict[str, int]:
    """Those of the values that are initializers, by name."""
    return {
        value.name or "": value.const_value.nbytes
        for value in values
        if value is not None and value.name in graph.initializers and value.const_value is not None
    }
