"""What ONNX's own checker and type inference say of a graph."""

from __future__ import annotations

import onnx
import onnx.shape_inference
import onnx_ir as ir

from dlo_export.exporter.skeleton import without_weights
from dlo_export.exporter.sources.shared_types import complete_types
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.runtimes.onnxruntime.operators import DOMAIN, IN_ONNX_DOMAIN


def infer_types(model: ir.Model) -> None:
    """Checks a foreign graph against the operators' schemas, and gives its values the types and shapes that follow.

    What the graph itself says of the values inside it is kept only where nothing follows: behind operators of other
    domains. Types decide what is written around a layer, so what is said of them must be so.

    Args:
        model: Changed in place: types and shapes of its values.

    Raises:
        GraphPassError: A node has other inputs, attributes or types than its operator, or an output is not of the type
            or shape that it is said to be.
    """
    proto = _checkable(model)
    try:
        onnx.checker.check_model(proto)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as err:  # the checker's and the inference's errors have no common base
        raise GraphPassError(
            f"the graph is not valid ONNX: {str(err).strip()}",
            hint="export it again; onnx.checker.check_model says the same of it",
        ) from err
    types = {value.name: value for value in inferred.graph.value_info}
    for node in model.graph:
        for output in node.outputs:
            if (found := types.get(output.name or "")) is not None and not output.is_graph_output():
                ir.serde.deserialize_value_info_proto(found, output)
    complete_types(model.graph)


def _checkable(model: ir.Model) -> onnx.ModelProto:
    """The graph without its weights, nothing said of the values inside it, its operators where ONNX's checker looks."""
    proto = without_weights(model)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        if node.domain == "" and node.op_type in IN_ONNX_DOMAIN:
            node.domain = DOMAIN
    if DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.add(domain=DOMAIN, version=1)
    return proto
