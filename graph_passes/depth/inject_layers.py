"""Deepen a decoder: insert layers derived from the ones it has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, MutableSequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS, past_name
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor, joined_rows
from dlo_export.checkpoints.llama_layer import layer_tensor_name
from dlo_export.graph_passes.depth.layer_copy import LayerCopy, copy_layer
from dlo_export.graph_passes.depth.layer_names import renumber_layers, renumbered
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.find.projections import Projection
from dlo_export.graph_passes.naming import unique_names
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, ORIGIN_KEY, PASS_KEY
from dlo_export.graph_passes.weights.storage import Place, WeightStorage

WeightSource = np.ndarray | LazyTensor


@dataclasses.dataclass(frozen=True, eq=False)
class LayerInjection:
    """One layer to insert.

    Attributes:
        position: Its index in the deepened model.
        source: Index, in the model as it is, of the layer whose nodes are copied.
        weights: Its weights by their Hugging Face names inside the layer ("mlp.up_proj.weight", …), in checkpoint
            orientation.
    """

    position: int
    source: int
    weights: Mapping[str, WeightSource]


@dataclasses.dataclass(frozen=True, eq=False)
class InjectLayersPass(GraphPass):
    """Insert decoder layers, each a copy of an existing layer's nodes with weights of its own.

    Before::

        x1, present.0 = layer_0(x0, past.0)
        x2, present.1 = layer_1(x1, past.1)

    After injecting (position 1, source 0)::

        x1, present.0 = layer_0(x0, past.0)
        c,  present.1 = layer_0'(x1, past.1)     # same nodes, new weights
        x2, present.2 = layer_1(c, past.2)       # renumbered, with its KV inputs and outputs

    Values that do not depend on the residual stream (masks, rotary tables, constants) are shared. Names are renumbered
    with anchored matches. New weights are lazy: read when the model is saved, one tensor at a time. Scope: main graph.
    Sources: TLI (arXiv 2410.11654), DLO (arXiv 2407.11030).

    Attributes:
        layers: What to insert.
    """

    nodes_from: ClassVar[Border | None] = "injected"

    layers: tuple[LayerInjection, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Where the layers go and what they derive from. Weights are not compared: that would read all of them."""
        return {"sources": {str(layer.position): layer.source for layer in self.layers}}

    def rewrite(self, model: ir.Model) -> bool:
        """Insert all layers.

        Raises:
            GraphPassError: With all problems: impossible positions or sources, weights that are missing or of the wrong
                shape, a layer that cannot be copied.
        """
        layers = find_decoder_layers(model.graph)
        self._refuse(layers)
        _Deepening(model.graph, layers, self).run()
        return True

    def ensures(self, model: ir.Model) -> None:
        """The deepened stream can be followed and its layers are numbered in order."""
        find_decoder_layers(model.graph)

    def _refuse(self, layers: tuple[DecoderLayer, ...]) -> None:
        # Every reason is told at once, and before anything is changed.
        problems = [] if self.layers else ["no layers were given"]
        problems += [
            f"layer {layer.index}: {place(layer.mlp.conditional)} skips its MLP branch"
            for layer in layers
            if layer.mlp.conditional is not None
        ]
        if layers[-1].output.is_graph_output():
            problems.append(f"the last hidden state '{layers[-1].output.name}' is an output of the graph")
        depth = len(layers) + len(self.layers)
        positions = [layer.position for layer in self.layers]
        problems += [
            f"position {position} is out of range, expected 0 to {depth - 1}"
            for position in positions
            if not 0 <= position < depth
        ]
        problems += [f"position {p} is given twice" for p in sorted({p for p in positions if positions.count(p) > 1})]
        for injection in self.layers:
            problems += _injection_problems(injection, layers)
        if problems:
            raise GraphPassError(
                "InjectLayersPass: " + "; ".join(problems) + ".",
                hint="positions count in the deepened model, sources in the model as it is; inject before routing",
            )


def _injection_problems(injection: LayerInjection, layers: tuple[DecoderLayer, ...]) -> list[str]:
    where = f"layer {injection.position}"
    if not 0 <= injection.source < len(layers):
        return [f"{where} derives from layer {injection.source}, expected 0 to {len(layers) - 1}"]
    source = layers[injection.source]
    # A subgraph reads values from around it by capture; a copy would have to rename them in there too.
    problems = [
        f"{place(node)} of layer {injection.source} holds a subgraph and cannot be copied"
        for node in source.nodes
        if any(attr.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for attr in node.attributes.values())
    ]
    expected = {projection.tensor: projection.contents.shape for projection in source.projections.values()}
    found = {name: tuple(weight.shape) for name, weight in injection.weights.items()}
    problems += [
        f"{where}: {name} has shape {found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    for storage, parts in _by_storage(source.projections.values()).items():
        ends = [0, *(part.stop for part in parts)]
        if [part.start for part in parts] != ends[:-1] or ends[-1] != storage.shape[0]:
            problems.append(f"{place(storage.node)} of layer {injection.source} holds more than the layer's weights")
    return problems


def _by_storage(projections: Iterable[Projection]) -> dict[WeightStorage, list[Projection]]:
    """Projections that lie side by side in one matrix, in the order of their rows."""
    found: dict[WeightStorage, list[Projection]] = {}
    for projection in sorted(projections, key=lambda projection: projection.start):
        found.setdefault(projection.storage, []).append(projection)
    return found


class _Deepening:
    """One run of the pass: renumber, then walk the new stream from front to back."""

    def __init__(self, graph: ir.Graph, layers: tuple[DecoderLayer, ...], request: InjectLayersPass) -> None:
        self.graph = graph
        self.layers = layers
        self.injections = {injection.position: injection for injection in request.layers}
        self.depth = len(layers) + len(self.injections)
        self.new_index = dict(enumerate(index for index in range(self.depth) if index not in self.injections))
        self.reads = [layer.input for layer in layers]  # what each original reads as its input, as the walk goes on
        # Weights follow from the layers' own data flow: they are told apart before anything is rewired.
        self.projections = [layer.projections for layer in layers]
        self.cache = {self.new_index[layer.index]: layer.cache for layer in layers}

    def run(self) -> None:
        """Insert the layers."""
        # Names first, so that a copy's name is free when it is made.
        renumber_layers(self.graph, self.new_index)
        self.unique = unique_names(self.graph)
        members = [frozenset(layer.nodes) for layer in self.layers]
        behind_last = [use for use in self.layers[-1].output.uses() if use.node not in members[-1]]
        stream, last_node = self.reads[0], self.reads[0].producer()
        # Front to back, one position of the deepened model after the other: an injected layer is a copy that reads the
        # stream so far, an original is made to read it. What was behind the last layer reads the new end.
        originals = iter(self.layers)
        for position in range(self.depth):
            assert last_node is not None, "the stream starts at the embedding node"
            if position in self.injections:
                copy = self._copy(self.injections[position], stream)
                for initializer in copy.initializers:
                    self.graph.register_initializer(initializer)
                self.graph.insert_after(last_node, copy.nodes)
                stream, last_node = copy.output, copy.nodes[-1]
                self.cache[position] = copy.cache
            else:
                layer = next(originals)
                for use in self.reads[layer.index].uses():
                    if use.node in members[layer.index]:
                        use.node.replace_input_with(use.idx, stream)
                self.reads[layer.index] = stream
                stream, last_node = layer.output, layer.mlp.add
        for use in behind_last:
            use.node.replace_input_with(use.idx, stream)
        self._order_interface()
        self._sort()

    def _copy(self, injection: LayerInjection, stream: ir.Value) -> LayerCopy:
        source, position = self.layers[injection.source], injection.position
        past = {
            value: ir.Value(name=past_name(position, part), type=value.type, shape=value.shape and value.shape.copy())
            for value, part in zip((source.past_key, source.past_value), CACHE_PARTS, strict=True)
        }
        # Names were renumbered before: the source's carry its index in the deepened model by now.
        numbers = {self.new_index[source.index]: position}

        def rename(name: str) -> str:
            new = renumbered(name, numbers)
            return self.unique(new if new != name else f"{name}.copy_{position}")

        weights = self._weights(injection)
        tags = {
            PASS_KEY: InjectLayersPass.__name__,
            LAYER_KEY: str(position),
            ORIGIN_KEY: json.dumps({"source": injection.source}),
        }
        return copy_layer(source, {self.reads[source.index]: stream, **past}, weights, rename, tags)

    def _weights(self, injection: LayerInjection) -> dict[Place, Mapping[ir.Value, ir.Value]]:
        """Weights of its own for every projection, even where they are equal to the source's: it is trained apart.

        They are stored as the source's are: what lies side by side there does so here, what is quantised is quantised.
        """
        found: dict[Place, Mapping[ir.Value, ir.Value]] = {}
        for storage, parts in _by_storage(self.projections[injection.source].values()).items():
            given = [_lazy(injection.weights[part.tensor]) for part in parts]
            name = layer_tensor_name(injection.position, _joined_name([part.tensor for part in parts]))
            found.update(storage.stored_alike(name, joined_rows(given), self.unique))
        return found

    def _order_interface(self) -> None:
        """KV inputs and outputs of all layers in order, where the first one stood."""
        caches = [self.cache[position] for position in range(self.depth)]
        _put_in_order(self.graph.inputs, [value for cache in caches for value in cache[:2]])
        _put_in_order(self.graph.outputs, [value for cache in caches for value in cache[2:]])

    def _sort(self) -> None:
        # A shared value may stand in the middle of the layer it was copied from: sorting moves it in front of both.
        try:
            self.graph.sort()
        except ValueError as error:
            raise GraphPassError(
                "InjectLayersPass: a copied layer reads values that only a later layer computes; expected what layers "
                "share (masks, lengths) to be computed before the first one.",
                hint="export the graph without common subexpression elimination, or inject after the source layer",
            ) from error


def _lazy(source: WeightSource) -> LazyTensor:
    return ArrayTensor(source) if isinstance(source, np.ndarray) else source


def _joined_name(tensors: list[str]) -> str:
    """`self_attn.q_proj+k_proj+v_proj.weight` for three weights side by side."""
    if len(tensors) == 1:
        return tensors[0]
    block, _, kind = tensors[0].split(".")
    return f"{block}.{'+'.join(tensor.split('.')[1] for tensor in tensors)}.{kind}"


def _put_in_order(interface: MutableSequence[ir.Value], values: list[ir.Value]) -> None:
    """Order an interface's KV values, given as key, value, key, value, …; in its own convention if that is other."""
    members = set(values)
    present = [index for index, value in enumerate(interface) if value in members]
    keys, contents = values[::2], values[1::2]
    # onnxruntime-genai lists all keys before all values.
    if interface[present[1]] in set(keys):
        values = keys + contents
    rest = [value for value in interface if value not in members]
    interface[:] = [*rest[: present[0]], *values, *rest[present[0] :]]
