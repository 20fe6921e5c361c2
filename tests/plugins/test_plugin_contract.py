"""One schema, and every implementation of it: references, kernels, twins, quick-deploy plugins, the C++ library."""

import ast
import inspect
import itertools
import re
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tensorrt_rtx as trt

from dlo_export.graph_passes.spec.ops import DOMAIN, ORT_OPS, PLUGIN_OPS, VERSION, reference_function
from dlo_export.plugins.contract import T_DTYPES, operand_dtypes, output_axes, size_problems, weight_input
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.kernels import INTEGERS, KERNELS
from dlo_export.plugins.library.generate import ops_header
from dlo_export.plugins.rtx_twins import DATA_TYPES, PluginTwin, PluginTwinCreator
from dlo_export.plugins.skip_down.reference import skip_down
from dlo_export.plugins.skip_gate_up.reference import skip_gate_up

PLUGINS = Path(__file__).parents[2] / "plugins"
REFERENCES = {"SkipGateUp": skip_gate_up, "SkipDown": skip_down}
SIZES = {"batch": 2, "sequence": 3, "hidden": 16, "intermediate": 24}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
every_op = pytest.mark.parametrize("op", PLUGIN_OPS.values(), ids=lambda op: op.name)


def names(operands):
    return [operand.name for operand in operands]


def shapes(operands):
    return [tuple(SIZES[name] for name in operand.dims) for operand in operands]


def random_inputs(op, t_dtype):
    rng = np.random.default_rng(7)
    inputs = {
        operand.name: rng.standard_normal(shape).astype(NUMPY[dtype])
        for operand, shape, dtype in zip(op.inputs, shapes(op.inputs), operand_dtypes(op, t_dtype), strict=False)
    }
    inputs["scale"][:] = [[0, 1.5, -0.0], [0.25, 0, 2]]
    return inputs


@every_op
def test_reference_has_the_schemas_operands_when_called_by_name(op):
    assert list(inspect.signature(REFERENCES[op.name]).parameters) == names(op.inputs)
    for t_dtype in T_DTYPES:
        output = REFERENCES[op.name](**random_inputs(op, t_dtype))
        assert [output.shape] == shapes(op.outputs)
        assert output.dtype == NUMPY[t_dtype]


@every_op
def test_reference_equals_the_schemas_function_when_onnx_runtime_runs_it(op):
    function = reference_function(op)
    values = [
        ir.val(operand.name, ir.DataType.FLOAT, shape)
        for operand, shape in zip((*op.inputs, *op.outputs), shapes((*op.inputs, *op.outputs)), strict=True)
    ]
    inputs, outputs = values[: len(op.inputs)], values[len(op.inputs) :]
    node = ir.node(op.name, inputs, domain=DOMAIN, outputs=outputs, attributes=op.attributes)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 23, DOMAIN: VERSION}, name="one_node")
    model = ir.Model(graph, ir_version=11, functions=[function])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = random_inputs(op, "float32")
    np.testing.assert_allclose(session.run(None, feeds)[0], REFERENCES[op.name](**feeds), rtol=1e-5, atol=1e-5)


@every_op
def test_kernel_takes_inputs_integers_outputs_when_launched(op):
    arguments = KERNELS[op.name].arg_names
    weight = op.inputs[weight_input(op)]
    assert arguments[: len(op.inputs) + INTEGERS + 1] == [
        *names(op.inputs),
        "tokens",
        *weight.dims,
        *names(op.outputs),
    ]


@every_op
def test_twin_names_what_the_parser_looks_for_when_made(op):
    creator = PluginTwinCreator(op)
    twin = creator.create_plugin(op.name, trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    assert op.attributes == {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
    assert (creator.name, creator.plugin_namespace, creator.plugin_version) == (op.name, DOMAIN, str(VERSION))
    assert (twin.plugin_name, twin.plugin_namespace, twin.plugin_version) == (op.name, DOMAIN, str(VERSION))
    assert twin.num_outputs == len(op.outputs)
    assert len(creator.field_names) == len(twin.get_fields_to_serialize()) == 0
    assert twin.get_workspace_size([], []) == 0


@every_op
def test_twin_accepts_exactly_the_schemas_types_when_all_are_tried(op):
    twin = PluginTwin(op)
    linear = trt.TensorFormat.LINEAR
    tried = [*DATA_TYPES.values(), trt.DataType.INT32]
    count = len(op.inputs) + len(op.outputs)

    def accepts(dtypes, format_=linear):
        entries = [types.SimpleNamespace(desc=types.SimpleNamespace(type=t, format=format_)) for t in dtypes]
        return all(twin.supports_format_combination(pos, entries, len(op.inputs)) for pos in range(count))

    accepted = {dtypes for dtypes in itertools.product(tried, repeat=count) if accepts(dtypes)}
    expected = {tuple(DATA_TYPES[name] for name in operand_dtypes(op, t_dtype)) for t_dtype in T_DTYPES}
    assert accepted == expected
    assert not any(accepts(dtypes, trt.TensorFormat.HWC) for dtypes in expected)
    for dtypes in expected:
        inputs, outputs = dtypes[: len(op.inputs)], dtypes[len(op.inputs) :]
        assert twin.get_output_data_types(inputs) == list(outputs)
    with pytest.raises(PluginError, match=r"got inputs of types INT32(.|\n)*expected \(FLOAT, FLOAT"):
        twin.get_output_data_types([trt.DataType.INT32] * len(op.inputs))


@every_op
def test_output_axes_follow_the_schemas_names_when_shapes_are_computed(op):
    for output, axes in zip(op.outputs, output_axes(op), strict=True):
        assert [shapes(op.inputs)[index][axis] for index, axis in axes] == [SIZES[name] for name in output.dims]


@every_op
def test_all_size_problems_are_told_when_there_are_several(op):
    assert size_problems(op, shapes(op.inputs)) == []
    assert size_problems(op, [[-1] * len(operand.dims) for operand in op.inputs]) == []
    wrong = [list(shape) for shape in shapes(op.inputs)]
    wrong[0] += [1]
    wrong[1][1] += 1
    wrong[weight_input(op)][0] = 12
    problems = "\n".join(size_problems(op, wrong))
    assert f"input '{op.inputs[0].name}' has shape [2, 3, " in problems
    assert "expected a multiple of 8" in problems
    assert size_problems(op, []) == [f"dlo::{op.name} got 0 inputs; the schema has {len(op.inputs)}"]


@every_op
def test_quick_deploy_functions_have_the_schemas_operands_when_read(op):
    """By their source: tensorrt.plugin needs enterprise TensorRT. test_quick_deploy runs them where it is there."""
    tree = ast.parse((PLUGINS / "quick_deploy.py").read_text())
    found = {}
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for decorator in function.decorator_list:
            identifier = ast.unparse(decorator.args[0]).replace("{DOMAIN}", DOMAIN)
            if identifier == f"f'{DOMAIN}::{op.name}'":
                found[ast.unparse(decorator.func)] = [argument.arg for argument in function.args.args]
    assert found == {
        "trtp.register": names(op.inputs),
        "trtp.autotune": [*names(op.inputs), "outputs"],
        "trtp.aot_impl": [*names(op.inputs), "outputs", "tactic"],
    }


@pytest.mark.parametrize("op", ORT_OPS.values(), ids=lambda op: op.name)
def test_generated_header_says_what_the_schema_says_when_the_library_is_built(op):
    header = ops_header(tuple(ORT_OPS.values()))
    assert f"kPluginOps = {len(PLUGIN_OPS)};" in header
    (row,) = re.findall(rf'^    {{"{op.name}", (.*)}},$', header, re.MULTILINE)
    counts = f"{len(op.inputs)}, {len(op.outputs)}, {weight_input(op)}"
    assert row.startswith(f"{counts}, ")
    operands = re.findall(r'{"(\w+)", (true|false), (\d), {([^}]*)}}', row)
    assert [(name, is_t == "true", int(rank), re.findall(r"\w+", dims)) for name, is_t, rank, dims in operands] == [
        (operand.name, operand.dtype == "T", len(operand.dims), list(operand.dims))
        for operand in (*op.inputs, *op.outputs)
    ]
    axes = re.findall(r"{(\d), (\d)}", row)
    assert tuple((int(index), int(axis)) for index, axis in axes) == output_axes(op)[0]
    assert f'kNamespace[] = "{DOMAIN}"' in header
    assert f'kVersion[] = "{VERSION}"' in header
    assert header.count("ElementType::k") == len(T_DTYPES)
