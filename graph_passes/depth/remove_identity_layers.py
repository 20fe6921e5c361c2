"""Take out decoder layers that pass the residual stream on as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import all_zeros
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.depth.layer_names import renumber_layers
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import (
    constant_behind,
    constant_scalar,
    constant_tensor,
    element_type,
    is_op,
)
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.find.projections import Projection
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, layer_of


@dataclasses.dataclass(frozen=True)
class RemoveIdentityLayersPass(GraphPass):
    """Remove layers that are proven to add nothing, with their cache, and renumber those behind them.

    Before::

        x1, present.0 = layer_0(x0, past.0)
        x2, present.1 = layer_1(x1, past.1)      # o_proj and down_proj, and their biases, are zeros: x2 = x1
        x3, present.2 = layer_2(x2, past.2)

    After removing layer 1::

        x1, present.0 = layer_0(x0, past.0)
        x3, present.1 = layer_2(x1, past.1)

    The proof: what either block adds to the stream is a product with a matrix of zeros, behind which nothing stands but
    a bias of zeros, factors that are numbers, casts, and an RMS norm, which makes zeros of zeros; and what it is added
    to is the stream, cast to no other type.
    Scope: main graph.

    Attributes:
        layers: Indices of the layers to remove.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (InjectLayersPass,)

    layers: tuple[int, ...]

    def rewrite(self, model: ir.Model) -> bool:
        """Remove the layers.

        Raises:
            GraphPassError: With all problems: layers that do not exist, or are not proven to pass everything on; or
                none would be left.
        """
        graph = model.graph
        layers = find_decoder_layers(graph)
        self._refuse(layers)
        removed = [layer for layer in layers if layer.index in self.layers]
        for layer in reversed(removed):
            # Later layers read what the layer read; its own nodes die with its cache. From the back, because a layer
            # may read the output of another one that goes.
            layer.output.replace_all_uses_with(layer.input)
        gone = {id(value) for layer in removed for value in (layer.present_key, layer.present_value)}
        graph.outputs[:] = [value for value in graph.outputs if id(value) not in gone]
        remove_unused(graph)
        gone = {id(value) for layer in removed for value in (layer.past_key, layer.past_value)}
        graph.inputs[:] = [value for value in graph.inputs if id(value) not in gone]
        kept = [layer.index for layer in layers if layer.index not in self.layers]
        _renumber(graph, {old: new for new, old in enumerate(kept)})
        return True

    def ensures(self, model: ir.Model) -> None:
        """The stream can be followed and its layers are numbered in order."""
        find_decoder_layers(model.graph)

    def _refuse(self, layers: tuple[DecoderLayer, ...]) -> None:
        problems = [] if self.layers else ["no layers were given"]
        problems += [
            f"layer {index} does not exist, expected 0 to {len(layers) - 1}"
            for index in self.layers
            if not 0 <= index < len(layers)
        ]
        if set(self.layers) >= set(range(len(layers))):
            problems.append(f"all {len(layers)} layers were given, expected one at least to stay")
        for layer in layers:
            if layer.index in self.layers:
                problems += [f"layer {layer.index}: {reason}" for reason in _why_not_identity(layer)]
        if problems:
            raise GraphPassError(
                "RemoveIdentityLayersPass: " + "; ".join(problems) + ".",
                hint="only layers that pass everything on can be removed; before layers are routed",
            )


def _why_not_identity(layer: DecoderLayer) -> Iterator[str]:
    """Why a layer is not proven to pass the stream on; nothing where it is."""
    try:
        projections = layer.projections
    except GraphPassError as error:
        yield error.message
        return
    for block, role in ((layer.attention, "o_proj"), (layer.mlp, "down_proj")):
        if block.conditional is not None:
            yield f"{place(block.conditional)} skips the block already"
        elif (cast := _changing_cast(block)) is not None:
            yield f"{place(cast)} changes the type of the stream in front of {place(block.add)}"
        ends = [projections[name] for name in (role, f"{role}.bias") if name in projections]
        yield from (f"{end.tensor} is not all zeros" for end in ends if not all_zeros(end.contents))
        if (node := _not_linear(block, ends)) is not None:
            yield f"{place(node)} stands between {ends[0].tensor} and the stream"


def _changing_cast(block: ResidualBlock) -> ir.Node | None:
    """A Cast between the stream and the addition that is not to the type the stream has; None where there is none.

    What computes a norm in float32 casts the stream first, and exporters let the addition read that too: in a float32
    graph it is the stream.
    """
    casts = (node for node in block.operand_nodes if is_op(node, "Cast"))
    dtype = element_type(block.stream_in)
    return next((cast for cast in casts if cast.attributes["to"].as_int() != dtype), None)


def _not_linear(block: ResidualBlock, ends: Sequence[Projection]) -> ir.Node | None:
    """A node behind the last projection that might make something of nothing; None where there is none.

    Args:
        block: What is added to the stream.
        ends: Its last projection, and the bias of that.
    """
    product, *biases = ends
    constants = {constant for bias in biases for constant in bias.storage.constants}
    value: ir.Value | None = block.branch
    while value is not None and (node := value.producer()) is not product.storage.node:
        if node is None:
            return block.add
        if is_op(node, "Cast", "Identity", "Reshape") or _is_norm_of_numbers(node):
            value = node.inputs[0]
            continue
        # Beside what comes from the product: a bias that is zero, or a number that is finite.
        others = [each for each in node.inputs if _constant_of(each) in constants] if is_op(node, "Add") else []
        others += [each for each in node.inputs if np.isfinite(_number(each))] if is_op(node, "Mul") else []
        if len(others) != 1:
            return node
        value = next(each for each in node.inputs if each is not others[0])
    return None


def _is_norm_of_numbers(node: ir.Node) -> bool:
    """Whether it is an RMS norm of 0 · scale / √epsilon for zeros, and that is a number: zero."""
    if not is_op(node, "RMSNormalization", "SimplifiedLayerNormalization"):
        return False
    scale = constant_behind(node.inputs[1])
    return node.attributes.get_float("epsilon", 0.0) > 0 and scale is not None and _is_finite(scale[0])


def _is_finite(constant: ir.Value) -> bool:
    tensor = constant_tensor(constant)
    return tensor is not None and bool(np.isfinite(tensor.numpy().astype(np.float32)).all())


def _constant_of(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value is prepared from."""
    found = constant_behind(value)
    return None if found is None else found[0]


def _number(value: ir.Value | None) -> float:
    """Of a constant of one element, else NaN."""
    number = constant_scalar(value)
    return float("nan") if number is None else number


def _renumber(graph: ir.Graph, numbers: Mapping[int, int]) -> None:
    renumber_layers(graph, numbers)
    for node in graph.all_nodes():
        if (layer := layer_of(node)) is not None:
            node.metadata_props[LAYER_KEY] = str(numbers[layer])
