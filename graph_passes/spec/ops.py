"""The operators of domain `dlo`: the one place that says their names, operands and attributes.

They are plugins of TensorRT's and custom operators of ONNX Runtime's (folder plugins/). Passes write them, and their
implementations are tested against what stands here. For runtimes without either each has a body in standard operators.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

DOMAIN = "dlo"
VERSION = 1
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators, which are not ours."""
# hidden and intermediate must be multiples of this: 8 sixteen-bit elements are the 16 bytes of one vector load, and a
# kernel that serves every model may assume nothing narrower without loading weights element by element.
WIDTH_MULTIPLE = 8
_FUNCTION_OPSET = 23


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input or output of an operator.

    Attributes:
        name: In the body, and in messages.
        dtype: "T" is the operator's one type parameter: float32, float16 or bfloat16. "int64" holds places.
        dims: Names of its axes; equal names are equal sizes.
        doc: What it holds.
    """

    name: str
    dtype: Literal["T", "float32", "int64"]
    dims: tuple[str, ...]
    doc: str


@dataclasses.dataclass(frozen=True)
class PluginOp:
    """An operator of domain `dlo`.

    Attributes:
        name: Its op_type, and the name of the plugin's creator.
        inputs: In order; none is optional.
        outputs: In order.
        doc: What it computes.
        body: The same in ONNX text, operators of the default domain.
    """

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    doc: str
    body: str

    @property
    def attributes(self) -> dict[str, str]:
        """Of every node: by them TensorRT's parser finds the plugin's creator. Plugins have no other field."""
        return {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


_TOKENS = ("batch", "sequence")
_SCALE = Operand("scale", "float32", _TOKENS, "Factor of the token's MLP branch; a token is skipped iff it is 0.")

SKIP_GATE_UP = PluginOp(
    "SkipGateUp",
    (
        Operand("hidden_states", "T", (*_TOKENS, "hidden"), "The stream after attention, normalised."),
        _SCALE,
        Operand("gate_weight", "T", ("hidden", "intermediate"), "Of gate_proj, as MatMul reads it."),
        Operand("up_weight", "T", ("hidden", "intermediate"), "Of up_proj, as MatMul reads it."),
    ),
    (Operand("gated", "T", (*_TOKENS, "intermediate"), "What down_proj reads; a skipped token's row is unspecified."),),
    "silu(x·gate) * (x·up) for the tokens that are not skipped, accumulated in float32 and rounded once.",
    body="""
        gate = MatMul (hidden_states, gate_weight)
        gate_sigmoid = Sigmoid (gate)
        silu = Mul (gate, gate_sigmoid)
        up = MatMul (hidden_states, up_weight)
        product = Mul (silu, up)
        zero = Constant <value_float = 0.0> ()
        skipped = Equal (scale, zero)
        last = Constant <value_ints = [-1]> ()
        skipped_column = Unsqueeze (skipped, last)
        zero_like = CastLike (zero, product)
        gated = Where (skipped_column, zero_like, product)
    """,
)

SKIP_DOWN = PluginOp(
    "SkipDown",
    (
        Operand("gated", "T", (*_TOKENS, "intermediate"), "Output of SkipGateUp; a skipped token's row is not read."),
        _SCALE,
        Operand("down_weight", "T", ("intermediate", "hidden"), "Of down_proj, as MatMul reads it."),
        Operand("residual", "T", (*_TOKENS, "hidden"), "The stream after attention."),
    ),
    (Operand("output", "T", (*_TOKENS, "hidden"), "The stream behind the layer."),),
    "residual + scale · (gated·down), computed in float32 and rounded once; a skipped token's residual, bit for bit.",
    body="""
        branch = MatMul (gated, down_weight)
        branch_float = Cast <to = 1> (branch)
        last = Constant <value_ints = [-1]> ()
        scale_column = Unsqueeze (scale, last)
        scaled = Mul (scale_column, branch_float)
        residual_float = Cast <to = 1> (residual)
        sum = Add (residual_float, scaled)
        rounded = CastLike (sum, residual)
        zero = Constant <value_float = 0.0> ()
        skipped = Equal (scale_column, zero)
        output = Where (skipped, residual, rounded)
    """,
)

ROUTER = PluginOp(
    "RouterScores",
    (
        Operand("hidden_states", "T", (*_TOKENS, "hidden"), "The stream that enters the layer."),
        Operand("router_weight", "float32", ("hidden", "one"), "Of the layer's router, a matrix of one column."),
    ),
    (Operand("scores", "float32", _TOKENS, "Above the layer's threshold where the token is active."),),
    "sigmoid(x·w), all of it in float32.",
    body="""
        stream = Cast <to = 1> (hidden_states)
        column = MatMul (stream, router_weight)
        last = Constant <value_ints = [-1]> ()
        logits = Squeeze (column, last)
        scores = Sigmoid (logits)
    """,
)

GATHER_ACTIVE = PluginOp(
    "GatherActive",
    (
        Operand("hidden_states", "float32", (*_TOKENS, "hidden"), "The stream that enters the layer."),
        Operand("router_weight", "float32", ("hidden", "one"), "Of the layer's router, a matrix of one column."),
        Operand("threshold", "float32", (), "What an active token's score is above."),
        Operand("values", "float32", (*_TOKENS, "width"), "What the active tokens' rows are taken of."),
    ),
    (
        Operand("scores", "float32", _TOKENS, "Of the router."),
        Operand(
            "index", "int64", ("active", "axes"), "Places of the active tokens, ascending, as GatherND reads them."
        ),
        Operand("rows", "float32", ("active", "width"), "Their rows of `values`."),
    ),
    "Rows of the tokens with sigmoid(x·w) > threshold, all of it in float32; the number of rows depends on data.",
    body="""
        column = MatMul (hidden_states, router_weight)
        last = Constant <value_ints = [-1]> ()
        logits = Squeeze (column, last)
        scores = Sigmoid (logits)
        active = Greater (scores, threshold)
        places = NonZero (active)
        index = Transpose <perm = [1, 0]> (places)
        rows = GatherND (values, index)
    """,
)
"""Of ONNX Runtime's library for the CPU provider alone: on CUDA the host would wait for the shape of what comes out."""

PLUGIN_OPS: dict[str, PluginOp] = {op.name: op for op in (SKIP_GATE_UP, SKIP_DOWN)}
"""What TensorRT has plugins of; ONNX Runtime's library has them too, for both providers."""
ORT_OPS: dict[str, PluginOp] = {**PLUGIN_OPS, ROUTER.name: ROUTER}
"""What ONNX Runtime's library has for both providers: TensorRT fuses the router's small operators by itself."""


def reference_function(op: PluginOp) -> ir.Function:
    """A model-local function that computes the operator in standard operators: with it any runtime runs the graph.

    Rows of skipped tokens, which the operator leaves unspecified, are zeros.
    """
    inputs = ", ".join(operand.name for operand in op.inputs)
    outputs = ", ".join(operand.name for operand in op.outputs)
    attributes = ", ".join(f'{name}: string = "{value}"' for name, value in op.attributes.items())
    # ONNX's text has functions only as parts of a model, hence the empty graph.
    text = (
        f'<ir_version: 11, opset_import: ["" : {_FUNCTION_OPSET}, "{DOMAIN}" : {VERSION}]>\n'
        "holder () => () {}\n"
        f'<domain: "{DOMAIN}", opset_import: ["" : {_FUNCTION_OPSET}]>\n'
        f"{op.name} <{attributes}> ({inputs}) => ({outputs}) {{{op.body}}}"
    )
    return next(iter(ir.from_onnx_text(text).functions.values()))
