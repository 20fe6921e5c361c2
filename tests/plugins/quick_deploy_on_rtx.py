"""Runs the quick-deploy plugins with the real `tensorrt.plugin` where enterprise TensorRT's library cannot be had.

Enterprise TensorRT's Python bindings can be installed from PyPI (tensorrt-cu13-bindings), its library cannot. The
bindings load on TensorRT-RTX's library, which has the same entry points but the legacy plugins' one, given here. That
library takes no quick-deploy plugin into a network, so this program lends the plugin an expression builder: a probe
plugin is parsed, and while TensorRT asks for its shapes, the quick-deploy plugin's functions are called as TensorRT's
builder calls them. It prints what they answer, as JSON.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import onnx
import tensorrt_rtx  # noqa: F401 - its libraries must be in the process

from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins import registration
from dlo_export.plugins.rtx_shim import provide_unversioned_library, stub_library

SONAMES = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1",
}
LEGACY_PLUGINS = "int initLibNvInferPlugins(void* logger, char const* space) { return 1; }"
HIDDEN, INTERMEDIATE = 64, 96


def import_bindings():
    """The module `tensorrt`, from the bindings' wheel."""
    with tempfile.TemporaryDirectory() as folder:
        for soname, needed in SONAMES.items():
            file = Path(folder) / soname
            file.write_bytes(stub_library(platform.machine(), soname, needed))
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        source, library = Path(folder) / "legacy.c", Path(folder) / "libnvinfer_plugin.so.11"
        source.write_text(LEGACY_PLUGINS)
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_bindings  # noqa: PLC0415 - its libraries had to be there first

    sys.modules["tensorrt"] = tensorrt_bindings
    return tensorrt_bindings


def model(op, batch, sequence):
    """One node of `op` in the probe's domain, all shapes constants, T bfloat16."""
    sizes = {"batch": batch, "sequence": sequence, "hidden": HIDDEN, "intermediate": INTERMEDIATE}

    def value(operand):
        type_ = onnx.TensorProto.BFLOAT16 if operand.dtype == "T" else onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_value_info(operand.name, type_, [sizes[name] for name in operand.dims])

    node = onnx.helper.make_node(
        op.name,
        [operand.name for operand in op.inputs],
        [operand.name for operand in op.outputs],
        domain="probe",
        plugin_namespace="probe",
        plugin_version="1",
    )
    graph = onnx.helper.make_graph([node], "probe", [value(v) for v in op.inputs], [value(v) for v in op.outputs])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("probe", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)


def probe_classes(trt, answers):
    class Probe(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, op):
            for base in Probe.__bases__:
                base.__init__(self)
            self.op = op
            self.num_outputs = 1
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, "probe", "1"
            self.asked = False
            creator = trt.get_plugin_registry().get_creator(op.name, "1", "dlo")
            self.quick = creator.create_plugin(
                op.name,
                "dlo",
                trt.PluginFieldCollection([]),
                trt.TensorRTPhase.BUILD,
                trt.QuickPluginCreationRequest.STRICT_AOT,
            )

        def get_capability_interface(self, type):
            return self

        def clone(self):
            return Probe(self.op)

        def get_output_data_types(self, input_types):
            self.types = list(input_types)
            ranks = [len(operand.dims) for operand in self.op.inputs]
            return self.quick.get_output_data_types(self.types, ranks)

        def get_output_shapes(self, inputs, shape_inputs, expr_builder):
            outputs = self.quick.get_output_shapes(inputs, shape_inputs, expr_builder)
            if not self.asked:
                self.asked = True
                answers[self.op.name] = self.ask(inputs, outputs, expr_builder)
            return outputs

        def ask(self, inputs, outputs, expr_builder):
            shapes = [[size.get_constant_value() for size in shape] for shape in (*inputs, *outputs)]
            descs = []
            for shape, type_ in zip(shapes, [*self.types, *self.quick.output_types], strict=True):
                desc = trt.DynamicPluginTensorDesc()
                inner = trt.PluginTensorDesc()
                inner.dims, inner.type, inner.format = trt.Dims(shape), type_, trt.TensorFormat.LINEAR
                desc.desc, desc.min, desc.max = inner, trt.Dims(shape), trt.Dims(shape)
                descs.append(desc)
            count = len(inputs)
            combinations = self.quick.get_supported_format_combinations(descs, count)
            self.quick.configure_plugin(descs[:count], descs[count:])
            answer = {
                "output": shapes[-1],
                "output_type": self.quick.output_types[0].name,
                "combinations": [
                    [entry.type.name for entry in combinations[start : start + len(descs)]]
                    for start in range(0, len(combinations), len(descs))
                ],
                "formats": sorted({entry.format.name for entry in combinations}),
                "kernels": {},
            }
            self.quick.aot_impl_function, implementation = self.recorded, self.quick.aot_impl_function
            for tactic in sorted(self.quick.get_valid_tactics()):
                self.quick.set_tactic(tactic)
                self.implementation, self.answer = implementation, {}
                launch, integers = types.SimpleNamespace(), {}
                self.quick.get_launch_params(inputs, descs, count, launch, Setter(integers), expr_builder)
                assert len(integers) == len(self.answer["integers"])
                assert set(vars(launch)) == set(self.answer["launch"])
                name, ptx = self.quick.get_kernel([d.desc for d in descs[:count]], [d.desc for d in descs[count:]])
                answer["kernels"][tactic] = {"entry": name.decode(), "ptx": ptx.decode(), **self.answer}
            return answer

        def recorded(self, *arguments):
            """The answer with its symbolic sizes evaluated; SymInt32.constant_value itself raises (TensorRT 11.4)."""
            entry, ptx, launch, integers = self.implementation(*arguments)
            self.answer = {
                "launch": {key: value._expr.get_constant_value() for key, value in vars(launch).items()},
                "integers": [value._expr.get_constant_value() for value in integers],
            }
            return entry, ptx, launch, integers

        def supports_format_combination(self, pos, in_out, num_inputs):
            return True

        def configure_plugin(self, inp, out):
            pass

        def on_shape_change(self, inp, out):
            pass

        def get_fields_to_serialize(self):
            return trt.PluginFieldCollection([])

        def attach_to_context(self, context):
            return self.clone()

        def enqueue(self, *arguments):
            raise NotImplementedError

    class Setter:
        """Where TensorRT takes the symbolic integers, as far as tensorrt.plugin uses it."""

        def __init__(self, expressions):
            self.expressions = expressions

        def __setitem__(self, index, expression):
            self.expressions[index] = expression

    class ProbeCreator(trt.IPluginCreatorV3One):
        def __init__(self, op):
            trt.IPluginCreatorV3One.__init__(self)
            self.op = op
            self.name, self.plugin_namespace, self.plugin_version = op.name, "probe", "1"
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name, fields, phase):
            return Probe(self.op)

    return ProbeCreator


def main():
    trt = import_bindings()
    provide_unversioned_library()
    registration.register_quick_deploy()
    registration.register_quick_deploy()
    answers = {"missing": list(registration.missing_creators(trt))}
    creator_class = probe_classes(trt, answers)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    creators = []
    for op in PLUGIN_OPS.values():
        creators.append(creator_class(op))
        trt.get_plugin_registry().register_creator(creators[-1], "probe")
        parser = trt.OnnxParser(network := builder.create_network(0), logger)
        if not parser.parse(model(op, *map(int, sys.argv[1:3])).SerializeToString()):
            raise SystemExit("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
        assert network.num_layers
    json.dump(answers, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # two sets of bindings on one library do not agree who frees what


if __name__ == "__main__":
    main()
