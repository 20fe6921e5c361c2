"""Keep one part of a decoder: what stands between two values of its residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir

from dlo_export.checkpoints.interface import STREAM_IN, STREAM_OUT
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import ROUTER_SCORES, TaggedNodes, role_values


@dataclasses.dataclass(frozen=True)
class KeepPartPass(GraphPass):
    """Cut a decoder in front of a layer and behind it, so that the layer runs with its own weights in memory alone.

    Before::

        (input_ids, mask, past.0, past.1) => (logits, present.0, present.1)
        x = Gather(embeddings, input_ids)
        y = Add(x, layer 0)
        z = Add(y, layer 1)
        logits = MatMul(Norm(z), head)

    After, for part 2, layer 1::

        (mask, past.1, part.stream_in) => (part.stream_out, present.1)
        z = Add(part.stream_in, layer 1)
        part.stream_out = Identity(z)

    Part 0 is the embedding, parts 1 to n the layers, part n + 1 the final norm and the head. What layers share (masks,
    rotary tables) each part computes for itself. Scope: main graph. Only for comparisons, never released.

    Attributes:
        part: Which one.
    """

    part: int

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (ExposeRoutingPass,)

    def rewrite(self, model: ir.Model) -> bool:
        """Cut.

        Raises:
            GraphPassError: There is no such part, or it reads other parts' values or caches.
        """
        graph = model.graph
        layers = find_decoder_layers(graph)
        if not 0 <= self.part <= len(layers) + 1:
            raise GraphPassError(
                f"KeepPartPass: there is no part {self.part}, expected 0 to {len(layers) + 1}.",
                hint="0 is the embedding, then come the layers, then the head",
            )
        borders = [layers[0].input, *(layer.output for layer in layers)]
        shape = ir.Shape((*layers[0].token_dims, layers[0].hidden_size))
        scores, states = role_values(graph, ROUTER_SCORES), _state_values(layers)
        kept, own = [], set[ir.Value | None]()
        if self.part <= len(layers):
            kept.append(self._stream_out(graph, borders[self.part], shape))
        else:
            inner = {*states, *scores.values()}
            kept += [value for value in graph.outputs if value not in inner]
        if 1 <= self.part <= len(layers):
            layer = layers[self.part - 1]
            # The router's score where it is shown.
            own_outputs = {layer.present_key, layer.present_value, layer.present_active, scores.get(layer.index)}
            kept += [value for value in graph.outputs if value in own_outputs]
            own = {layer.past_key, layer.past_value, layer.past_active}
        if self.part:
            self._replace_by_input(graph, borders[self.part - 1], shape)
        # What nothing reads any more are the other parts, with their weights, caches and decisions.
        graph.outputs[:] = kept
        remove_unused(graph)
        graph.inputs[:] = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
        foreign = [value.name for value in graph.inputs if value in states - own]
        if foreign:
            raise GraphPassError(
                f"KeepPartPass: part {self.part} reads the caches of other layers: {foreign}.",
                hint="compare the model as a whole",
            )
        return True

    def _stream_out(self, graph: ir.Graph, stream: ir.Value, shape: ir.Shape) -> ir.Value:
        new = TaggedNodes(self._name, self.part)
        output = new.add("Identity", stream, name=STREAM_OUT, dtype=element_type(stream), shape=shape)
        graph.extend(new.nodes)
        return output

    def _replace_by_input(self, graph: ir.Graph, stream: ir.Value, shape: ir.Shape) -> None:
        replacement = ir.Value(name=STREAM_IN, type=stream.type, shape=shape)
        if replacement.type is None and (dtype := element_type(stream)) is not None:
            replacement.type = ir.TensorType(dtype)
        graph.inputs.append(replacement)
        stream.replace_all_uses_with(replacement)


def _state_values(layers: Iterable[DecoderLayer]) -> set[ir.Value | None]:
    """Inputs and outputs that carry state from step to step; None where a layer has no state of activity."""
    return {value for layer in layers for value in (*layer.cache, layer.past_active, layer.present_active)}
