"""Another lowering of an artefact's graph, from the artefact alone: its config.json, its routers, its weights' places.

The graph is built as the export built it, from a configuration and a table of shapes, and takes its weights from where
they lie. Whether that is the artefact's graph is not assumed: it is first built in the lowering that the artefact has,
and must come out the same, node by node.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.config import LlamaConfig, RoutingConfig
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import AbsentTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.exporter.artefact_runner import gives_last_logits, held_tokens
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.model_metadata import copy_model_metadata
from dlo_export.exporter.pipeline import onnxruntime_steps, run_steps
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.weight_file import with_axes
from dlo_export.graph_passes.cleanup.multiply_tied_head import MultiplyTiedHeadPass
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.graph_passes.routing.decide_by_logits import DecideByLogitsPass, decisions_by_scores
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass, multiplies_columns
from dlo_export.graph_passes.row_tensor import RowTensor
from dlo_export.graph_passes.spec.pass_contract import GraphPass, passes_run
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription


@dataclasses.dataclass(frozen=True)
class _ReleasedSource:
    """A `GraphSource` of a released graph: what its config.json says, with its own routers."""

    config: LlamaConfig
    released: ir.Model
    adapter: None = None
    removed_layers: tuple[int, ...] = ()
    packs_weights: bool = True

    @property
    def routing(self) -> RoutingConfig | None:
        return self.config.routing

    def routers(self) -> dict[int, np.ndarray]:
        values = self.released.graph.initializers
        layers = () if self.routing is None else self.routing.layers
        found = {layer: values[router_name(layer)].const_value for layer in layers if router_name(layer) in values}
        return {layer: tensor.numpy().reshape(-1) for layer, tensor in found.items() if tensor is not None}

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        # Weights are taken from the artefact.
        shapes = self.config.tensor_shapes()
        tensors = {name: AbsentTensor(shape, np.dtype(np.float32)) for name, shape in shapes.items()}
        return plain_graph(self.config, tensors, dtype)


class ReloweredGraph:
    """An artefact's model.onnx, in whatever lowering is asked for.

    Args:
        folder: The artefact; its files are the described ones.
        description: Its.

    Raises:
        InputError: The graph cannot be built from the artefact: it was made of somebody's graph, by another version,
            or its config.json was edited.
    """

    def __init__(self, folder: Path, description: ArtefactDescription) -> None:
        self._folder, self._description = folder, description
        self._released = load_graph(folder / MODEL_NAME)
        if (reason := self._not_the_same()) is not None:
            raise InputError(
                f"{folder}: {MODEL_NAME} cannot be lowered again: {reason}",
                hint="export the model once with each --lowering, and compare the artefacts with dlo bench",
            )

    def lowered(self, lowering: str) -> ir.Model:
        """The graph in a lowering of the artefact's provider, weights and metadata those of the artefact.

        Raises:
            InputError: It needs what the artefact's weights do not hold.
        """
        model, problems = self._build(lowering), []
        own = {name: value.const_value for name, value in self._released.graph.initializers.items()}
        for name, value in model.graph.initializers.items():
            built, stored = value.const_value, own.get(name)
            if built is not None and stored is not None and _is_stored_so(built, stored):
                value.const_value = with_axes(stored, built.shape.numpy())
            elif isinstance(built, RowTensor):
                problems.append(name)
        if problems:
            raise InputError(
                f"{self._folder}: lacks weights that --lowering {lowering} needs: {', '.join(problems[:3])}",
                hint="export the model again",
            )
        copy_model_metadata(self._released, model, lowering)
        return model

    def _build(self, lowering: str) -> ir.Model:
        config = LlamaConfig.from_json(self._folder / "config.json")
        source = _ReleasedSource(config, self._released)
        target = PROVIDER_TARGETS[self._description.provider]
        record = find_lowering(lowering, target)
        steps = onnxruntime_steps(
            source,
            record,
            target,
            last_logits=gives_last_logits(self._description),
            static_cache=held_tokens(self._description),
        )
        # Exports of before there were these passes have another head or other routers: what they have stays.
        newer: list[type[GraphPass]] = []
        if MultiplyTiedHeadPass.__name__ not in {run.name for run in passes_run(self._released)}:
            newer.append(MultiplyTiedHeadPass)
        lowered = find_lowering(self._description.lowering, target).make_pass is not None
        if lowered and decisions_by_scores(self._released.graph):
            newer.append(DecideByLogitsPass)
        if lowered and multiplies_columns(self._released.graph):
            newer.append(MultiplyRouterRowsPass)
        steps = [step for step in steps if not isinstance(step.graph_pass, tuple(newer))]
        return run_steps(source.plain_model(graph_dtype(self._description.dtype)), steps)

    def _not_the_same(self) -> str | None:
        """What differs between the graph as it is and as it is built; None where nothing does."""
        if self._description.source.kind == "onnx":
            return "it was made of another exporter's graph"
        own, built = _comparable(self._released), _comparable(self.lowered(self._description.lowering))
        different = [part for part, content in own.items() if built[part] != content]
        return f"built from config.json, it has other {different[0]}" if different else None


def _is_stored_so(built: ir.TensorProtocol, stored: ir.TensorProtocol) -> bool:
    """Whether a weight is of the type and shape that are stored, and of the same contents where they are known.

    Known numbers may have other axes: lowerings have routers' weights as a column or as a row.
    """
    if isinstance(built, RowTensor):
        return (built.dtype, tuple(built.shape.numpy())) == (stored.dtype, tuple(stored.shape.numpy()))
    return built.dtype == stored.dtype and np.array_equal(built.numpy().reshape(-1), stored.numpy().reshape(-1))


def _comparable(model: ir.Model) -> dict[str, Any]:
    """What a graph computes, in comparable form: values by the order of their nodes, weights by name and place."""
    graph = ir.to_proto(model).graph
    return {
        "inputs": [entry.SerializeToString(deterministic=True) for entry in graph.input],
        "outputs": [entry.SerializeToString(deterministic=True) for entry in graph.output],
        "weights": {entry.name: entry.SerializeToString(deterministic=True) for entry in graph.initializer},
        "nodes": _nodes(graph, {}),
    }


def _nodes(graph: Any, numbers: dict[str, int]) -> list[Any]:
    """Nodes of a GraphProto, without what they are called, and which pass made them.

    Args:
        graph: Its subgraphs included.
        numbers: Of the values that nodes before have computed, by name; those of this graph are added.
    """
    found: list[Any] = []
    for node in graph.node:
        attributes = {}
        for attribute in node.attribute:
            if attribute.HasField("g"):
                attributes[attribute.name] = _nodes(attribute.g, dict(numbers))
            else:
                attributes[attribute.name] = attribute.SerializeToString(deterministic=True)
        # A weight or an input of the graph is known by its name alone.
        read = [numbers.get(name, name) for name in node.input]
        for name in node.output:
            numbers[name] = len(numbers)
        found.append((node.domain, node.op_type, read, len(node.output), attributes))
    found.append([numbers.get(entry.name, entry.name) for entry in graph.output])
    return found
