"""What a graph consists of: layers, bytes per part, operators."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER
from dlo_export.exporter.artifact import FILE_NAME, MODEL_NAME, load_description
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.exporter.tensorrt.engine_check import check_engine
from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.errors import DecoderLayersNotFound, GraphPassError
from dlo_export.graph_passes.find.data_flow import consumed_values
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, role_values


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `dlo inspect` reports.

    Attributes:
        path: The graph.
        ops: Count of every operator, subgraphs included, most frequent first.
        bytes: Of the weights by part: embedding and head, attention, MLP, routers, other.
        layers: Per decoder layer: index, injected, routed, identity (None where the graph alone does not tell), bytes.
        layers_problem: Why no layers were found; None where they were.
        description: dlo_artifact.json, where there is one.
        engine_problems: Why engines are stale, damaged, or not for this machine; None where there are no engines.
    """

    path: Path
    ops: dict[str, int]
    bytes: dict[str, int]
    layers: list[dict[str, Any]]
    layers_problem: str | None
    description: dict[str, Any] | None
    engine_problems: list[str] | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


def inspect_model(path: Path) -> Inspection:
    """Inspects an artefact folder or any `.onnx` file; external weights need not be there.

    Raises:
        InputError: Neither.
    """
    graph_path = path / MODEL_NAME if path.is_dir() else path
    if not graph_path.is_file():
        raise InputError(f"{path}: no {MODEL_NAME} in it" if path.is_dir() else f"{path}: no such file")
    model = load_graph(graph_path)
    ops = collections.Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes()
    )
    # Only to find the layers: additions that were fused with a norm stand apart again.
    SplitSkipNormsPass()(model)
    description = load_description(graph_path.parent) if (graph_path.parent / FILE_NAME).is_file() else None
    try:
        layers, problem = find_decoder_layers(model.graph), None
    except DecoderLayersNotFound as err:
        layers, problem = (), str(err)
    return Inspection(
        graph_path,
        dict(ops.most_common()),
        _bytes_by_part(model.graph, layers),
        [_layer_row(model.graph, layer, description) for layer in layers],
        problem,
        description,
        check_engine(graph_path.parent) if description is not None and description["engines"] else None,
    )


def _layer_row(graph: ir.Graph, layer: DecoderLayer, description: dict[str, Any] | None) -> dict[str, Any]:
    said = description["layers"][layer.index] if description else {}
    injected = any(node.metadata_props.get("dlo.origin") for node in layer.nodes)
    return {
        "index": layer.index,
        "injected": said.get("injected", injected),
        "routed": layer.index in role_values(graph, "router_scores"),
        "identity": said["identity"] if said else _is_identity(layer),
        "bytes": sum(_weight_bytes(graph, layer.nodes).values()),
    }


def _is_identity(layer: DecoderLayer) -> bool | None:
    """Whether both branches end in zeros; None where the projections cannot be told."""
    try:
        projections = layer.projections.values()
    except GraphPassError:
        return None
    ends = [projection.weight.const_value for projection in projections if projection.tensor in LLAMA_LAYER.branch_ends]
    return all(tensor is not None and not np.any(tensor.numpy()) for tensor in ends)


def _bytes_by_part(graph: ir.Graph, layers: tuple[DecoderLayer, ...]) -> dict[str, int]:
    routers = {node for node in graph if node.metadata_props.get(LAYER_KEY) and node.op_type == "MatMul"}
    parts: dict[str, dict[str, int]] = {
        "attention": _weight_bytes(graph, [node for layer in layers for node in layer.attention.nodes]),
        "mlp": _weight_bytes(graph, [node for layer in layers for node in layer.mlp.nodes if node not in routers]),
        "routers": _weight_bytes(graph, routers),
    }
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


def _weight_bytes(graph: ir.Graph, nodes: Any) -> dict[str, int]:
    """Initializers the nodes read, by name."""
    return {
        value.name or "": value.const_value.nbytes
        for node in nodes
        for value in consumed_values(node)
        if value.name in graph.initializers and value.const_value is not None
    }
