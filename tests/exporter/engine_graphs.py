"""Small decoder graphs in the form TensorRT gets, built by hand: seconds per engine, every kind of layer in them.

Their weights are random; what they compute does not matter, what they are made of does.
"""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper

from dlo_export.exporter.tensorrt.engine_request import EngineRequest, OptimizationProfile

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, MAX_CACHE, VOCAB = 64, 4, 16, 96, 16, 40
DTYPES = {"fp32": T.FLOAT, "fp16": T.FLOAT16, "bf16": T.BFLOAT16}
NAMES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass
class Tiny:
    """A decoder whose layers all route, by one lowering.

    Attributes:
        lowering: "none", "compact", "if" or "plugin".
        layers: Number of decoder layers.
        dtype: "fp32", "fp16" or "bf16".
    """

    lowering: str = "compact"
    layers: int = 2
    dtype: str = "bf16"

    def __post_init__(self):
        self.nodes, self.initializers, self.rng = [], [], np.random.default_rng(0)
        self.inputs = [
            helper.make_tensor_value_info("input_ids", T.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("write_indices", T.INT64, ["batch"]),
            helper.make_tensor_value_info("mask", self.type, ["batch", 1, "sequence", MAX_CACHE]),
        ]
        self.outputs = [helper.make_tensor_value_info("logits", self.type, ["batch", "sequence", VOCAB])]

    @property
    def type(self):
        return DTYPES[self.dtype]

    def weight(self, name, shape, dtype=None):
        array = self.rng.standard_normal(shape).astype(np.float32) * 0.1
        self.initializers.append(helper.make_tensor(name, dtype or self.type, shape, array.ravel()))
        return name

    def constant(self, name, values, dtype=T.INT64):
        if name not in {tensor.name for tensor in self.initializers}:
            shape = np.shape(values)
            self.initializers.append(helper.make_tensor(name, dtype, shape, np.ravel(values)))
        return name

    def op(self, op_type, inputs, name, nodes=None, **attributes):
        node = helper.make_node(op_type, inputs, [name], name=name, **attributes)
        (self.nodes if nodes is None else nodes).append(node)
        return name

    def norm(self, x, name):
        scale = self.weight(f"{name}.weight", [HIDDEN])
        return self.op("RMSNormalization", [x, scale], name, axis=-1)

    def attention(self, x, layer, with_mask=True):
        prefix = f"model.layers.{layer}.self_attn"
        heads = {}
        for part in ("q", "k", "v"):
            rows = self.op("MatMul", [x, self.weight(f"{prefix}.{part}.weight", [HIDDEN, HIDDEN])], f"{prefix}.{part}")
            shape = self.constant("split", [0, -1, HEADS, HEAD_DIM])
            rows = self.op("Reshape", [rows, shape], f"{prefix}.{part}_rows")
            heads[part] = self.op("Transpose", [rows], f"{prefix}.{part}_heads", perm=[0, 2, 1, 3])
        for part, name in (("k", "key"), ("v", "value")):
            past, present = f"past_key_values.{layer}.{name}", f"present.{layer}.{name}"
            shape = ["batch", HEADS, MAX_CACHE, HEAD_DIM]
            self.inputs.append(helper.make_tensor_value_info(past, self.type, shape))
            self.outputs.append(helper.make_tensor_value_info(present, self.type, shape))
            heads[part] = self.op("TensorScatter", [past, heads[part], "write_indices"], present, axis=2)
        operands = [heads["q"], heads["k"], heads["v"], *(["mask"] if with_mask else [])]
        out = self.op("Attention", operands, f"{prefix}.attention", q_num_heads=HEADS, kv_num_heads=HEADS)
        out = self.op("Transpose", [out], f"{prefix}.rows", perm=[0, 2, 1, 3])
        out = self.op("Reshape", [out, self.constant("merge", [0, -1, HIDDEN])], f"{prefix}.merged")
        return self.op("MatMul", [out, self.weight(f"{prefix}.o.weight", [HIDDEN, HIDDEN])], f"{prefix}.o")

    def router(self, x, layer):
        prefix = f"model.routers.{layer}"
        x = x if self.dtype == "fp32" else self.op("Cast", [x], f"{prefix}.input", to=T.FLOAT)
        products = self.op("Mul", [x, self.weight(f"{prefix}.weight", [HIDDEN], T.FLOAT)], f"{prefix}.products")
        logits = self.op("ReduceSum", [products, self.constant("last", [-1])], f"{prefix}.logits", keepdims=0)
        scores = self.op("Sigmoid", [logits], f"{prefix}.scores")
        return self.op("Greater", [scores, self.constant("half", 0.5, T.FLOAT)], f"{prefix}.active")

    def mlp_weights(self, prefix):
        for part, shape in (("gate", [HIDDEN, INTERMEDIATE]), ("up", [HIDDEN, INTERMEDIATE])):
            self.weight(f"{prefix}.{part}.weight", shape)
        self.weight(f"{prefix}.down.weight", [INTERMEDIATE, HIDDEN])

    def mlp(self, x, prefix, nodes=None):
        gate = self.op("MatMul", [x, f"{prefix}.gate.weight"], f"{prefix}.gate", nodes)
        gate = self.op("Swish", [gate], f"{prefix}.silu", nodes)
        up = self.op("MatMul", [x, f"{prefix}.up.weight"], f"{prefix}.up", nodes)
        product = self.op("Mul", [gate, up], f"{prefix}.product", nodes)
        return self.op("MatMul", [product, f"{prefix}.down.weight"], f"{prefix}.down", nodes)

    def skipping_mlp(self, h, active, layer):
        prefix, router = f"model.layers.{layer}.mlp", f"model.routers.{layer}"
        self.mlp_weights(prefix)
        out = f"model.layers.{layer}"
        if self.lowering == "none":
            return self.op("Add", [h, self.mlp(h, prefix)], out)
        if self.lowering == "compact":
            return self.compact_mlp(h, active, layer)
        if self.lowering == "if":
            numbers = self.op("Cast", [active], f"{router}.active_number", to=T.FLOAT)
            largest = self.op("ReduceMax", [numbers], f"{router}.any_number", keepdims=0)
            condition = self.op("Cast", [largest], f"{router}.any_active", to=T.BOOL)
            then, keep = [], []
            self.op("Add", [h, self.mlp(h, prefix, then)], f"{prefix}.active_output", then)
            self.op("Identity", [h], f"{prefix}.skipped_output", keep)
            branches = {
                f"{branch}_branch": helper.make_graph(
                    nodes, f"{prefix}.{branch}_branch", [], [helper.make_tensor_value_info(last, self.type, None)]
                )
                for branch, nodes, last in (
                    ("then", then, f"{prefix}.active_output"),
                    ("else", keep, f"{prefix}.skipped_output"),
                )
            }
            self.nodes.append(helper.make_node("If", [condition], [out], name=f"{prefix}.if", **branches))
            return out
        scale = self.op("Cast", [active], f"{router}.scale", to=T.FLOAT)
        plugin = {"domain": "dlo", "plugin_namespace": "dlo", "plugin_version": "1"}
        weights = [f"{prefix}.gate.weight", f"{prefix}.up.weight"]
        gated = self.op("SkipGateUp", [h, scale, *weights], f"{prefix}.skip_gate_up", **plugin)
        return self.op("SkipDown", [gated, scale, f"{prefix}.down.weight", h], f"{prefix}.skip_down", **plugin)

    def compact_mlp(self, h, active, layer):
        prefix, router = f"model.layers.{layer}.mlp", f"model.routers.{layer}"
        flat = self.op("Reshape", [h, self.constant("rows", [-1, HIDDEN])], f"{prefix}.flat")
        flags = self.op("Reshape", [active, self.constant("all", [-1])], f"{router}.flat_active")
        flags = self.op("Cast", [flags], f"{router}.flags", to=T.FLOAT)
        count = self.op("ReduceSum", [flags], f"{router}.count", keepdims=1)
        count = self.op("Reshape", [count, self.constant("all", [-1])], f"{router}.count_1d")
        count = self.op("Cast", [count], f"{router}.k", to=T.INT64)
        chosen = [f"{router}.topk_values", f"{router}.active_tokens"]
        self.nodes.append(helper.make_node("TopK", [flags, count], chosen, name=f"{router}.topk", axis=0, sorted=0))
        rows = self.op("Gather", [flat, chosen[1]], f"{prefix}.rows", axis=0)
        sums = self.op("Add", [rows, self.mlp(rows, prefix)], f"{prefix}.row_sums")
        places = self.op("Unsqueeze", [chosen[1], self.constant("last", [-1])], f"{prefix}.row_places")
        merged = self.op("ScatterND", [flat, places, sums], f"{prefix}.scattered")
        shape = self.op("Shape", [h], f"{prefix}.stream_shape")
        return self.op("Reshape", [merged, shape], f"model.layers.{layer}")

    def model(self, with_mask=True):
        self.__post_init__()  # from the beginning, however often
        x = self.op("Gather", [self.weight("embeddings", [VOCAB, HIDDEN]), "input_ids"], "embedded", axis=0)
        for layer in range(self.layers):
            active = None if self.lowering == "none" else self.router(x, layer)
            attended = self.attention(self.norm(x, f"model.layers.{layer}.norm"), layer, with_mask)
            h = self.op("Add", [x, attended], f"model.layers.{layer}.attended")
            x = self.skipping_mlp(h, active, layer)
        self.op("MatMul", [x, self.weight("lm_head", [HIDDEN, VOCAB])], "logits")
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", 24), *([helper.make_opsetid("dlo", 1)] if self.lowering == "plugin" else [])]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)

    def expected_dtypes(self):
        """Interface and routers."""
        named = {value.name: value.type.tensor_type.elem_type for value in [*self.inputs, *self.outputs]}
        names = {T.INT64: "int64"} | {DTYPES[name]: onnx_name for name, onnx_name in NAMES.items()}
        routed = range(0 if self.lowering == "none" else self.layers)
        return {name: names[dtype] for name, dtype in named.items()} | {
            f"model.routers.{layer}.logits": "float" for layer in routed
        }


def profiles(model, max_batch=2, max_sequence=8):
    """A prefill and a decode profile for any graph whose free axes are batch and sequence."""
    sizes = {"prefill": (max_batch, max_sequence), "decode": (max_batch, 1)}
    made = []
    for name, (batch, sequence) in sizes.items():
        shapes = {}
        for value in model.graph.input:
            dims = [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
            if any(isinstance(dim, str) for dim in dims):
                least = tuple({"batch": 1, "sequence": 1}.get(dim, dim) for dim in dims)
                most = tuple({"batch": batch, "sequence": sequence}.get(dim, dim) for dim in dims)
                shapes[value.name] = (least, most, most)
        made.append(OptimizationProfile(name, shapes))
    return tuple(made)


def request(folder, tiny=None, model=None, **fields):
    """Saves a graph (its weights inside) and asks for its engine."""
    tiny = tiny or Tiny()
    model = model or tiny.model()
    graph = folder / "model.onnx"
    onnx.save(model, graph)
    routed = () if tiny.lowering == "none" else tuple(range(tiny.layers))
    values = {
        "targets": ("sm89",),
        "profiles": profiles(model)[:1],
        "lowering": tiny.lowering,
        "dtype": tiny.dtype,
        "routed_layers": routed,
        "expected_dtypes": tiny.expected_dtypes(),
        "use_cache": False,
    }
    return EngineRequest(graph, folder / "engines" / "model.engine", "rtx", **(values | fields))
