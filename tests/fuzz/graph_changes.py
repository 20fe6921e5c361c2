"""Changes to a graph after which it may well compute something, but something else: what is found must still be so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.mutations import damage_onnx

# What stands on an edge, as (operator, whether a constant scales or shifts, attributes).
_INSERTED = (
    ("Identity", None, {}),
    ("Mul", 1.5, {}),
    ("Add", 0.25, {}),
    ("Neg", None, {}),
    ("Relu", None, {}),
    ("Sigmoid", None, {}),
    ("Cast", None, {"to": TensorProto.FLOAT}),
    ("Dropout", None, {}),
    ("Clip", None, {}),
)


def change_graph(random: Random, path: Path) -> str:
    """Damages a graph, or changes one to three things of it such that it may run; says what."""
    if random.random() < 0.2:
        return damage_onnx(random, path)
    model = onnx.load(path, load_external_data=False)
    said = [random.choice(_CHANGES)(random, model, path.parent) for _ in range(random.choice((1, 1, 2, 3)))]
    path.write_bytes(model.SerializeToString())
    return ", ".join(said)


def _edge(random: Random, model: onnx.ModelProto) -> tuple[onnx.NodeProto, int]:
    """A node and one of its inputs."""
    node = random.choice([node for node in model.graph.node if any(node.input)])
    return node, random.choice([place for place, name in enumerate(node.input) if name])


def _insert_node(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    node, place = _edge(random, model)
    operator, number, attributes = random.choice(_INSERTED)
    name = f"inserted.{random.randrange(10**9)}"
    inputs = [node.input[place]]
    if number is not None:
        dtype = random.choice((np.float32, np.float32, np.float16, np.int64))
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, dtype), f"{name}.number"))
        inputs = random.choice(([*inputs, f"{name}.number"], [f"{name}.number", *inputs]))
    new = helper.make_node(operator, inputs, [name], name=random.choice(("", name)), **attributes)
    said = f"{operator} before {node.op_type} {node.name}[{place}]"
    node.input[place] = name
    model.graph.node.insert([*model.graph.node].index(node), new)
    return said


def _exchange_inputs(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    node = random.choice([node for node in model.graph.node if len(node.input) > 1])
    first, second = random.sample(range(len(node.input)), 2)
    node.input[first], node.input[second] = node.input[second], node.input[first]
    return f"{node.op_type} {node.name}: inputs {first} and {second} exchanged"


def _read_another(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """A node reads what another node of its kind reads at the same place: other layers' streams, masks, caches."""
    node, place = _edge(random, model)
    alike = [other for other in model.graph.node if other.op_type == node.op_type and len(other.input) > place]
    other = random.choice(alike)
    said = f"{node.op_type} {node.name}[{place}]: {node.input[place]} → {other.input[place]}"
    node.input[place] = other.input[place]
    return said


def _share_weight(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """Two tensors of one type and shape exchange their names, or one takes the other's place."""
    first = random.choice(model.graph.initializer)
    alike = [t for t in model.graph.initializer if (t.data_type, t.dims) == (first.data_type, first.dims)]
    second = random.choice(alike)
    if random.random() < 0.5:
        said = f"{first.name} and {second.name} exchanged"
        first.name, second.name = second.name, first.name
        return said
    for node in model.graph.node:
        node.input[:] = [second.name if name == first.name else name for name in node.input]
    return f"{second.name} in place of {first.name}"


def _change_number(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """An attribute's number, or one of its list, becomes another that may make sense."""
    numbers = [
        (node, attribute)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT, onnx.AttributeProto.INTS)
    ]
    node, attribute = random.choice(numbers)
    said = f"{node.op_type} {node.name}: {attribute.name}"
    if attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f *= random.choice((0.5, 2.0, -1.0))
        return f"{said} {attribute.f}"
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = random.choice((attribute.i + 1, attribute.i - 1, 2 * attribute.i, 1 - attribute.i))
        return f"{said} {attribute.i}"
    if len(attribute.ints) > 1:
        attribute.ints[:] = random.sample([*attribute.ints], len(attribute.ints))
    return f"{said} {[*attribute.ints]}"


def _put_into_branch(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """A node computed by an If, from values outside; its other branch computes zeros of it."""
    place = random.randrange(len(model.graph.node))
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[place])
    outputs = [name for name in node.output if name]
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.output[:] = [name and f"{name}.inside" for name in node.output]
    values = [onnx.ValueInfoProto(name=f"{name}.inside") for name in outputs]
    then = helper.make_graph([inner], "then", [], values)
    other = onnx.GraphProto()
    other.CopyFrom(then)
    condition = f"condition.{random.randrange(10**9)}"
    model.graph.initializer.append(numpy_helper.from_array(np.array(random.random() < 0.8), condition))
    del model.graph.node[place]
    branch = helper.make_node("If", [condition], outputs, name=f"{node.name}.if", then_branch=then, else_branch=other)
    model.graph.node.insert(place, branch)
    return f"{node.op_type} {node.name} in a branch"


def _put_into_function(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    place = random.randrange(len(model.graph.node))
    node = model.graph.node[place]
    name = f"Part{random.randrange(10**9)}"
    inputs = [*dict.fromkeys(each for each in node.input if each)]
    outputs = [each for each in node.output if each]
    imports = [*model.opset_import]
    model.functions.append(helper.make_function("somebody", name, inputs, outputs, [node], imports))
    if "somebody" not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("somebody", 1))
    said = f"{node.op_type} {node.name} in a function"
    call = helper.make_node(name, inputs, outputs, domain="somebody", name=f"{node.name}.call")
    model.graph.node.insert(place, call)
    del model.graph.node[place + 1]
    return said


def _close_a_cycle(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    node, place = _edge(random, model)
    after = [later for later in model.graph.node if node.output[0] in later.input] or [node]
    node.input[place] = random.choice(after).output[0]
    return f"{node.op_type} {node.name}[{place}] in a cycle"


def _annotate(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """The graph says of a value inside it what is not so."""
    node = random.choice([node for node in model.graph.node if any(node.output)])
    name = random.choice([name for name in node.output if name])
    kind = random.choice((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL))
    shape = random.choice(([], [1], [1, 1, 64], ["batch", "sequence", 7], [2**40], None))
    kept = [value for value in model.graph.value_info if value.name != name]
    del model.graph.value_info[:]
    model.graph.value_info.extend([*kept, helper.make_tensor_value_info(name, kind, shape)])
    return f"{name} said to be {kind} {shape}"


def _fork_output(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """One more output of the graph: any value inside it."""
    node = random.choice([node for node in model.graph.node if any(node.output)])
    name = random.choice([name for name in node.output if name])
    kind, shape = random.choice((TensorProto.FLOAT, TensorProto.INT64)), [f"{name}.{axis}" for axis in range(3)]
    model.graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    return f"{name} given out"


def _cut_data(random: Random, model: onnx.ModelProto, folder: Path) -> str:
    """A data file that is longer or shorter than it was, or its tensors a little farther on."""
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not external:
        return "nothing, no data file"
    tensor = random.choice(external)
    entries = {entry.key: entry for entry in tensor.external_data}
    file = folder / entries["location"].value
    match random.randrange(4):
        case 0 | 1:
            with file.open("ab") as data:
                data.write(bytes(random.choice((1, 4096, 10**6))))
            return f"{file.name} longer"
        case 2:
            with file.open("r+b") as data:
                data.truncate(random.randrange(file.stat().st_size))
            return f"{file.name} shorter"
        case _:
            offset = int(entries["offset"].value) if "offset" in entries else 0
            changed = max(0, offset + random.choice((-256, -64, -4, -1, 1, 4, 64, 4096)))
            if "offset" in entries:
                entries["offset"].value = str(changed)
            return f"{tensor.name} at {changed}"


_CHANGES: tuple[Callable[[Random, onnx.ModelProto, Path], str], ...] = (
    *(_insert_node, _insert_node, _insert_node, _exchange_inputs, _exchange_inputs, _read_another, _read_another),
    *(_share_weight, _share_weight, _change_number, _change_number, _put_into_branch, _put_into_branch),
    *(_put_into_function, _put_into_function, _annotate, _annotate, _fork_output, _cut_data, _close_a_cycle),
)
