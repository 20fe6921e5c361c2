"""Parses and builds a model of both plugins with TensorRT-RTX; prints, as JSON, what happened.

A program of its own, because a plugin can end the process. Arguments: twins or the library's path, T, hidden,
intermediate.
"""

import json
import sys

import ml_dtypes
import numpy as np
import onnx
import tensorrt_rtx as trt

from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins import registration
from dlo_export.plugins.errors import PluginError

TYPES = {
    "float32": (onnx.TensorProto.FLOAT, np.float32),
    "float16": (onnx.TensorProto.FLOAT16, np.float16),
    "bfloat16": (onnx.TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


def model(t_dtype, hidden, intermediate):
    """SkipGateUp and SkipDown, one behind the other, batch and sequence dynamic, weights constants."""
    type_, array_type = TYPES[t_dtype]
    shapes = {
        "gate_weight": (hidden, intermediate),
        "up_weight": (hidden, intermediate),
        "down_weight": (intermediate, hidden),
    }
    rng = np.random.default_rng(0)  # equal weights would share their place in the engine
    weights = [
        onnx.helper.make_tensor(name, type_, shape, rng.standard_normal(shape).astype(array_type).tobytes(), raw=True)
        for name, shape in shapes.items()
    ]
    names = {"residual": "hidden_states"}  # one input serves as both

    def node(op):
        inputs = [names.get(operand.name, operand.name) for operand in op.inputs]
        outputs = [operand.name for operand in op.outputs]
        return onnx.helper.make_node(op.name, inputs, outputs, name=op.name, domain="dlo", **op.attributes)

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node(op) for op in PLUGIN_OPS.values()],
        "plugins",
        [
            value("hidden_states", type_, ["batch", "sequence", hidden]),
            value("scale", onnx.TensorProto.FLOAT, ["batch", "sequence"]),
        ],
        [value("output", type_, ["batch", "sequence", hidden])],
        weights,
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("dlo", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)


class Errors(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []

    def log(self, severity, text):
        if severity <= trt.ILogger.Severity.ERROR:
            self.lines.append(text)


def build(plugins, t_dtype, hidden, intermediate):
    logger = Errors()
    builder = trt.Builder(logger)
    answer = {"before": list(registration.missing_creators(trt))}
    registration.register_twins()  # repeating either is harmless, and the library takes the twins' place
    registration.register_twins()
    if plugins != "twins":
        registration.load_library(trt, plugins)
        registration.load_library(trt, plugins)
        registration.register_twins()
    answer["after"] = list(registration.missing_creators(trt))
    answer["fields"] = {
        creator.name: len(creator.field_names)
        for creator in trt.get_plugin_registry().all_creators
        if creator.plugin_namespace == "dlo"
    }
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    answer["parsed"] = parser.parse(model(t_dtype, hidden, intermediate).SerializeToString())
    if answer["parsed"]:
        output = network.get_output(0)
        answer["output"] = [output.dtype.name, list(output.shape)]
        config = builder.create_builder_config()
        config.num_compute_capabilities = 2
        for position, target in enumerate((trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)):
            config.set_compute_capability(target, position)
        profile = builder.create_optimization_profile()
        profile.set_shape("hidden_states", (1, 1, hidden), (1, 1, hidden), (4, 64, hidden))
        profile.set_shape("scale", (1, 1), (1, 1), (4, 64))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        answer["engine"] = engine.nbytes if engine is not None else 0
    return {**answer, "errors": logger.lines}


if __name__ == "__main__":
    try:
        json.dump(build(*sys.argv[1:3], *map(int, sys.argv[3:5])), sys.stdout)
    except PluginError as error:
        json.dump({"refused": str(error)}, sys.stdout)
