"""The operators of domain `dlo` as onnx's checker knows operators, so that it judges the nodes that lowerings write."""

import onnx.defs

from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS, VERSION


def register_schemas():
    """Makes the operators known to the checker (`check_custom_domain=True`); repeating it is harmless."""
    for op in PLUGIN_OPS.values():
        if not onnx.defs.has(op.name, DOMAIN):
            onnx.defs.register_schema(_schema(op))


def _schema(op):
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        doc=op.doc,
        inputs=[_formal(operand) for operand in op.inputs],
        outputs=[_formal(operand) for operand in op.outputs],
        type_constraints=[("T", [f"tensor({kind.onnx})" for kind in FLOATS], "Type of weights and streams.")],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.STRING, "For TensorRT's parser.")
            for name in op.attributes
        ],
    )


def _formal(operand):
    type_ = "T" if operand.dtype == "T" else "tensor(float)"
    return onnx.defs.OpSchema.FormalParameter(operand.name, type_, operand.doc)
