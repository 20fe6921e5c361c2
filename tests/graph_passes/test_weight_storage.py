"""How graphs store weights: read as ONNX Runtime computes with them, and others stored in the same form."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.checkpoints.lazy_tensors import ArrayTensor, JoinedTensor
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.weights.block_codes import dequantize, pack, quantize, unpack
from dlo_export.graph_passes.weights.linear import linear_bias, linear_weight
from dlo_export.graph_passes.weights.matmul_nbits import packed_codes
from dlo_export.graph_passes.weights.storage import StoredRows

ROWS, COLUMNS, BLOCK = 6, 40, 32  # [out, in]: the second block of a row is not full
BLOCKS = 2
RNG = np.random.default_rng(0)


def _constant(name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _nbits(bits: int, zero_points: str, *, flat: bool = False, scale_type: type = np.float32, **more) -> ir.Node:
    codes = RNG.integers(0, 256, (ROWS, BLOCKS, BLOCK * bits // 8), np.uint8)
    scales = RNG.uniform(0.1, 1, (ROWS, BLOCKS)).astype(scale_type)
    inputs = [ir.val("x", ir.DataType.FLOAT), _constant("codes", codes), _constant("scales", scales)]
    packed = RNG.integers(0, 256, (ROWS, BLOCKS * bits // 8), np.uint8)
    points = {"packed": packed, "float": RNG.integers(0, 16, (ROWS, BLOCKS)).astype(scale_type)}
    if zero_points != "none":
        inputs.append(_constant("zero_points", points[zero_points]))
    if flat:
        inputs[2:] = [_constant(value.name, value.const_value.numpy().reshape(-1)) for value in inputs[2:]]
    attributes = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": BLOCK, **more}
    return ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name="product")


def _dequantized(dtype: ir.DataType, *, by_block: bool, turned: bool = False) -> ir.Node:
    kind, columns = dtype.numpy(), 64
    info = ml_dtypes.iinfo(kind)
    shape = (ROWS, columns) if turned else (columns, ROWS)
    codes = RNG.integers(int(info.min), int(info.max) + 1, shape).astype(kind)
    blocks = (ROWS, columns // BLOCK) if turned else (columns // BLOCK, ROWS)
    scales = RNG.uniform(0.1, 1, blocks if by_block else ROWS).astype(np.float32)
    inputs = [_constant("codes", codes, dtype), _constant("scales", scales)]
    if info.min == 0:
        inputs.append(_constant("zero_points", RNG.integers(0, int(info.max), scales.shape).astype(kind), dtype))
    in_axis = 1 if turned else 0
    attributes = {"axis": in_axis, "block_size": BLOCK} if by_block else {"axis": 1 - in_axis}
    weight = ir.node("DequantizeLinear", inputs, attributes, name="dequantize").outputs[0]
    weight.name = "weight"
    if turned:
        weight = ir.node("Transpose", [weight], {"perm": [1, 0]}, name="turn").outputs[0]
        weight.name = "turned"
    return ir.node("MatMul", [ir.val("x", ir.DataType.FLOAT), weight], name="product")


NODES = {
    "4 bits": lambda: _nbits(4, "none"),
    "8 bits": lambda: _nbits(8, "none"),
    "4 bits, zero points": lambda: _nbits(4, "packed"),
    "4 bits, zero points, in a row": lambda: _nbits(4, "packed", flat=True),
    "4 bits, float zero points": lambda: _nbits(4, "float"),
    "INT4 by block": lambda: _dequantized(ir.DataType.INT4, by_block=True),
    "UINT4 by block": lambda: _dequantized(ir.DataType.UINT4, by_block=True),
    "INT8 by block, transposed": lambda: _dequantized(ir.DataType.INT8, by_block=True, turned=True),
    "INT8 by output": lambda: _dequantized(ir.DataType.INT8, by_block=False),
    "UINT8 by output": lambda: _dequantized(ir.DataType.UINT8, by_block=False),
}


def _multiplied(node: ir.Node, constants: dict[ir.Value, ir.Value]) -> np.ndarray:
    """The matrix that ONNX Runtime multiplies by, [out, in]: the product with the unit matrix."""
    nodes, initializers, waiting = [], [], [node]
    while waiting:
        each = waiting.pop()
        nodes.insert(0, each)
        for index, value in enumerate(each.inputs):
            if value is not None and value.const_value is not None:
                each.replace_input_with(index, constants.get(value, value))
                initializers.append(each.inputs[index])
            elif value is not None and value.producer() is not None:
                waiting.append(value.producer())
    source, product = node.inputs[0], node.outputs[0]
    product.name = "y"
    columns = linear_weight(node).shape[1]
    source.shape = ir.Shape((columns, columns))
    product.type, product.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((columns, None))
    graph = ir.Graph(
        [source], [product], nodes=nodes, initializers=initializers, opset_imports={"": 21, "com.microsoft": 1}
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    (found,) = ort.InferenceSession(model, options).run(None, {"x": np.eye(columns, dtype=np.float32)})
    return found.T


@pytest.mark.parametrize("made", NODES.values(), ids=NODES)
def test_rows_are_those_that_onnxruntime_multiplies_by(made) -> None:
    node = made()
    storage = linear_weight(node)
    found = storage.rows(0, storage.shape[0])
    np.testing.assert_array_equal(storage.rows(2, 4), found[2:4])
    np.testing.assert_allclose(found, _multiplied(node, {}), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("made", NODES.values(), ids=NODES)
def test_other_contents_are_stored_alike(made) -> None:
    node = made()
    storage = linear_weight(node)
    given = RNG.standard_normal(storage.shape).astype(np.float32)
    given[1] = 0
    halves = JoinedTensor((ArrayTensor(given[:2]), ArrayTensor(given[2:])))
    places = storage.stored_alike("new.weight", halves, lambda name: name)
    constants = {old: new for replaced in places.values() for old, new in replaced.items()}
    assert set(constants) == set(storage.constants)
    for old, new in constants.items():
        assert (new.dtype, tuple(new.shape)) == (old.const_value.dtype, tuple(old.const_value.shape))
        assert len(new.const_value.tobytes()) == new.const_value.nbytes
    stored = _multiplied(node, constants)
    assert not stored[1].any()
    # Half a step, the steps of a block being its range in so many codes; its ends are codes, or half a step away.
    bits = 8 if any(value.dtype in (ir.DataType.INT8, ir.DataType.UINT8) for value in storage.constants[:1]) else 4
    bits = node.attributes.get_int("bits", bits)
    largest = np.abs(given).max(-1, keepdims=True)
    assert (np.abs(stored - given) <= 1.01 * largest / (1 << (bits - 1))).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_type", [np.float32, np.float16])
def test_codes_stay_when_they_are_quantised_again(bits, scale_type) -> None:
    rows = RNG.standard_normal((5, COLUMNS)).astype(np.float32)
    settings = {"bits": bits, "block": 16, "scale_type": np.dtype(scale_type), "symmetric": True}
    once = quantize(rows, **settings)
    again = quantize(dequantize(once, COLUMNS).astype(np.float32), **settings)
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(unpack(pack(once.codes, bits), bits, 16), once.codes)


def test_bias_is_found_when_it_is_added_behind_or_inside() -> None:
    bias = _constant("bias", np.arange(ROWS, dtype=np.float32))
    inside = _nbits(4, "none")
    inside.resize_inputs(6)
    inside.replace_input_with(5, bias)
    behind = _nbits(4, "none")
    ir.node("Add", [behind.outputs[0], bias])
    for node in (inside, behind):
        np.testing.assert_array_equal(linear_bias(node).rows(0, ROWS), np.arange(ROWS))
    assert linear_bias(_nbits(4, "none")) is None


REFUSED = {
    "prepacked": (lambda: _nbits(4, "none", weight_prepacked=1), "attribute weight_prepacked"),
    "blocks": (lambda: _nbits(4, "none", block_size=16), "codes [6, 2, 16], expected [6, 3, 8]"),
    "bits": (lambda: _nbits(3, "none"), "3 bits in 32s"),
    "rows": (lambda: _nbits(4, "none", N=7), "codes [6, 2, 16], expected [7, 2, 16]"),
    "scales": (lambda: _nbits(4, "none", scale_type=np.int32), "INT32 scales"),
}


@pytest.mark.parametrize(("made", "reason"), REFUSED.values(), ids=REFUSED)
def test_weight_is_refused_when_it_is_stored_in_another_way(made, reason) -> None:
    with pytest.raises(GraphPassError, match="MatMulNBits node 'product': its weight has ") as error:
        linear_weight(made())
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "options", "index", "shape", "reason"),
    [
        (ir.DataType.INT4, {"by_block": True}, 1, (3, ROWS), "scales [3, 6] along axis 0 do not scale blocks"),
        (ir.DataType.INT4, {"by_block": True}, 1, (2, ROWS - 1), "scales [2, 5] along axis 0 do not scale blocks"),
        (ir.DataType.INT8, {"by_block": True, "turned": True}, 1, (ROWS, 1), "scales [6, 1] along axis 1 do not scale"),
        (ir.DataType.INT8, {"by_block": False}, 1, (ROWS + 1,), "scales [7] along axis 1 do not scale blocks"),
        (ir.DataType.INT8, {"by_block": False}, 1, (), "scales [] along axis 1 do not scale blocks of inputs"),
        (ir.DataType.UINT4, {"by_block": True}, 2, (ROWS, 2), "zero points [6, 2] are not one for each of the scales"),
        (ir.DataType.UINT8, {"by_block": False}, 2, (1,), "zero points [1] are not one for each of the scales [6]"),
        (ir.DataType.UINT8, {"by_block": False}, 2, None, "do not scale blocks of inputs, or outputs, of a matrix"),
        (ir.DataType.INT8, {"by_block": False}, 0, (2, 3, 4), "dequantises no constant matrix of 4 or 8 bits"),
    ],
)
def test_dequantised_weight_is_refused_when_its_parts_do_not_fit(dtype, options, index, shape, reason) -> None:
    node = _dequantized(dtype, **options)
    source = node
    while source.op_type != "DequantizeLinear":
        source = source.inputs[-1].producer()
    kind = source.inputs[index].dtype
    part = None if shape is None else _constant("part", np.ones(shape, kind.numpy()), kind)
    source.replace_input_with(index, part)
    with pytest.raises(GraphPassError, match="DequantizeLinear node 'dequantize': ") as error:
        linear_weight(node)
    assert reason in str(error.value)


def test_node_has_no_weight_when_it_lacks_the_input() -> None:
    node = ir.node("MatMul", [ir.val("x", ir.DataType.FLOAT)], name="product")
    assert linear_weight(node) is None


def test_rows_of_a_part_are_a_tensor_of_their_own() -> None:
    storage = linear_weight(_nbits(4, "none"))
    part = StoredRows(storage, 2, 5)
    assert (part.shape, part.nbytes) == ((3, COLUMNS), 3 * COLUMNS * 4)
    np.testing.assert_array_equal(part.rows(1, 9), storage.rows(3, 5))


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8])
@pytest.mark.parametrize("turned", [False, True])
def test_weight_is_the_same_when_its_codes_are_stored_as_one_operator_reads_them(dtype, turned) -> None:
    weight = linear_weight(_dequantized(dtype, by_block=True, turned=turned))
    attributes = {"K": weight.shape[1], "N": ROWS, "bits": weight.bits, "block_size": weight.block}
    inputs = [ir.val("x", ir.DataType.FLOAT), *packed_codes("weight", weight, lambda name: name)]
    packed = linear_weight(ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name="product"))
    np.testing.assert_array_equal(packed.rows(0, ROWS), weight.rows(0, ROWS))
