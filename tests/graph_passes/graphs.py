"""Small decoders in ONNX text, shared by the pass tests."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

# The smallest thing with the form of a decoder layer: a residual branch with a KV cache, then one without.
# `{mlp}` and `{add}` stand for the MLP branch, which computes d from h, and for what adds it.
_TEMPLATE = """<ir_version: 11, opset_import: ["" : {opset}, "com.microsoft" : 1]>
tiny (int64[B,S] ids, float[B,P,2] "past_key_values.0.key", float[B,P,2] "past_key_values.0.value"{inputs})
  => (float[B,S,2] logits, float[B,T,2] "present.0.key", float[B,T,2] "present.0.value"{outputs})
<float[4,2] table = {{1,2,-3,1,2,-1,0.5,-2}}, float[2] norm = {{1,0.5}}, float[2,3] up = {{1,-1,2,0.5,3,-2}},
 float[3,2] down = {{1,2,-1,0.5,-2,1}}, int64[1] one = {{1}}, int64[1] last = {{-1}}, float zero = {{0}}{initializers}>
{{ x = Gather (table, ids)
  "present.0.key" = Concat <axis = 1> ("past_key_values.0.key", x)
  "present.0.value" = Concat <axis = 1> ("past_key_values.0.value", x)
  seen = ReduceMean ("present.0.key", one)
  attended = ReduceMean ("present.0.value", one)
  both = Mul (seen, attended)
  mixed = Mul (x, both)
  h = Add (x, mixed)
  {mlp}
  {add}
  logits = Identity (y) }}"""

MLP = """n = RMSNormalization (h, norm)
  u = MatMul (n, up)
  a = Sigmoid (u)
  d = MatMul (a, down)"""


def tiny_decoder(
    mlp: str = MLP,
    add: str = "y = Add (h, d)",
    *,
    opset: int = 23,
    inputs: str = "",
    outputs: str = "",
    initializers: str = "",
) -> str:
    """ONNX text of a decoder of one layer, hidden size 2, vocabulary 4."""
    return _TEMPLATE.format(mlp=mlp, add=add, opset=opset, inputs=inputs, outputs=outputs, initializers=initializers)


def masked_decoder(mlp: str = MLP, select: str = "m = Where (column, d, zero)", **parts: str) -> str:
    """The same with its MLP branch masked by a graph input `active`."""
    masked = f"{mlp}\n  column = Unsqueeze (active, last)\n  {select}"
    parts["inputs"] = ", bool[B,S] active" + parts.get("inputs", "")
    return tiny_decoder(masked, "y = Add (h, m)", **parts)


def tiny_feeds(batch: int = 2, sequence: int = 3, past: int = 2) -> dict[str, np.ndarray]:
    """Inputs of `tiny_decoder`."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, batch, past, 2)).astype(np.float32)
    return {
        "ids": rng.integers(0, 4, (batch, sequence)),
        "past_key_values.0.key": cache[0],
        "past_key_values.0.value": cache[1],
    }


def in_float16(model: ir.Model) -> ir.Model:
    """The model with float16 weights, cache and stream; ONNX text has no float16 constants."""
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    return model
