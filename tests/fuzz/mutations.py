"""Damages to files of every format that is read: each the format's structure with something wrong in it.

Every function damages a file in place and says what it did. The same random numbers make the same damage.
"""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import onnx

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 65_536, 100_000, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
)
WORDS = (
    *("", " ", "null", "true", "0", "-1", "float64", "F64", "I64", "BOOL", "llama", "gpt2", "mlp", "layer", "copy"),
    *(
        "a" * 5_000,
        "../../outside",
        "/etc/hostname",
        "/dev/zero",
        ".",
        "..",
        "a/b",
        "\0",
        "x\0y",
        "\ud800",
        "\u202e",
        "é",
    ),
    *("\x1b[2J", "\n\n", "{}", "%s", "[bold]", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "file:///x"),
)
SIZES = (0, 1, 2, 3, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def damage_json(random: Random, path: Path) -> str:
    """Changes one to three values of a JSON file, or its text."""
    if random.random() < 0.1:
        return damage_bytes(random, path)
    values = json.loads(path.read_text(encoding="utf-8"))
    said = [_change_json(random, values) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    text = json.dumps(values)
    if random.random() < 0.05:
        text = _odd_json_text(random, text)
        said.append("as odd text")
    path.write_text(text, encoding="utf-8")
    return ", ".join(said)


def damage_safetensors(random: Random, path: Path) -> str:
    """Changes the header's JSON, its length, or the tensors' bytes."""
    stored = path.read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header, data = json.loads(stored[8 : 8 + length]), bytearray(stored[8 + length :])
    match random.randrange(8):
        case 0:
            return damage_bytes(random, path)
        case 1:
            length = random.choice((*SIZES, length - 1, length + 1, len(stored) - 8, len(stored)))
            path.write_bytes((length % 2**64).to_bytes(8, "little") + stored[8:])
            return f"header length {length}"
        case 2:
            said = _damage_weights(random, data)
            text = json.dumps(header)
        case 3:
            text, said = _odd_json_text(random, json.dumps(header)), "odd text of the header"
        case 4:  # consistent in itself: offsets are made anew
            name = random.choice([name for name in header if name != "__metadata__"])
            said = _change_tensor(random, header, name)
            data = _laid_out(header, data)
            text = json.dumps(header)
        case _:
            said = ", ".join(_change_json(random, header) for _ in range(random.choice((1, 1, 2))))
            text = json.dumps(header)
    encoded = text.encode("utf-8", errors="surrogatepass")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return said


def damage_gguf(random: Random, path: Path) -> str:
    """Overwrites what stands behind a key or a tensor's name, a count at the start, or anything."""
    stored = bytearray(path.read_bytes())
    choice = random.random()
    if choice < 0.15:
        return damage_bytes(random, path)
    if choice < 0.25:
        place, name = random.choice((0, 4, 8, 16)), "start"  # magic, version, tensors, keys
    else:
        names = list(re.finditer(rb"(?:general|llama|tokenizer|blk|token_embd|output)[a-z0-9_.]*", stored))
        match = random.choice(names)
        name = match.group().decode()
        if random.random() < 0.1:
            stored[match.start()] ^= 1
            path.write_bytes(stored)
            return f"another name than {name}"
        # A value's type and the value, a list's type and length; or a tensor's dimensions, sizes, type and offset.
        place = match.end() + random.choice((0, 0, 4, 4, 4, 8, 12, 16, 20, 24, 28))
    value = random.choice((*SIZES, 4, 5, 6, 10, 12, 39, 0x7FC00000, 0x7F800000))
    width = random.choice((4, 4, 8))
    stored[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    path.write_bytes(stored)
    return f"{value} in {width} bytes at {place}, behind {name}"


def damage_onnx(random: Random, path: Path) -> str:
    """Changes one to three things of a graph: nodes, values, tensors, types, versions, metadata."""
    if random.random() < 0.1:
        return damage_bytes(random, path)
    model = onnx.load(path, load_external_data=False)
    said = [random.choice(_GRAPH_CHANGES)(random, model) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as err:  # protobuf refuses what it could not read: surrogates
        return f"nothing ({err})"
    return ", ".join(said)


def damage_floats(random: Random, path: Path) -> str:
    """Changes numbers in a file of float32 weights."""
    data = bytearray(path.read_bytes())
    said = _damage_weights(random, data)
    path.write_bytes(data)
    return said


def damage_bytes(random: Random, path: Path) -> str:
    """Cuts a file off, or changes, inserts, repeats or leaves out some of its bytes."""
    stored = bytearray(path.read_bytes())
    place = random.randrange(len(stored) + 1)
    length = random.choice((1, 2, 4, 8, 64, 1000))
    match random.randrange(6):
        case 0:
            said, stored = "cut off", stored[:place]
        case 1:
            said, stored[place : place + 1] = (
                "one bit",
                bytes([stored[place] ^ 1 << random.randrange(8)]) if place < len(stored) else b"\0",
            )
        case 2:
            said, stored[place : place + length] = f"{length} other bytes", random.randbytes(length)
        case 3:
            said, stored[place:place] = f"{length} more bytes", random.randbytes(length)
        case 4:
            said, stored[place : place + length] = f"without {length} bytes", b""
        case _:
            said, stored[place:place] = f"{length} bytes twice", stored[place : place + length]
    path.write_bytes(stored)
    return f"{said} at {place}"


def damage_place(random: Random, path: Path) -> str:
    """Puts something else where the file was: nothing, a folder, a pipe, a link to anywhere."""
    stored = path.read_bytes()
    path.unlink()
    kind = random.choice(
        ("missing", "empty", "folder", "pipe", "dangling", "loop", "device", "outside", "socket", "inside")
    )
    match kind:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "dangling":
            path.symlink_to(path.with_name("nowhere"))
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/full")))
        case "outside":
            outside = path.parent.with_name("outside")
            outside.mkdir()
            (outside / path.name).write_bytes(stored)
            path.symlink_to(Path("..") / outside.name / path.name)
        case "inside":
            path.with_name("elsewhere").write_bytes(stored)
            path.symlink_to("elsewhere")
        case "socket":
            os.mknod(path, 0o140644)
    return kind


def _change_json(random: Random, values: Any) -> str:
    """Changes something anywhere in JSON values; says where and how."""
    holder, trail = values, []
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = random.choice(keys)
        trail.append(str(key)[:60])
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or random.random() < 0.2:
            break
        holder = inner
    where = "/".join(trail)
    if not keys:
        if isinstance(holder, dict):
            holder[random.choice(WORDS)] = _hostile_value(random)
        return f"{where}: filled"
    match random.randrange(8):
        case 0:
            del holder[key]
            return f"{where}: left out"
        case 1:
            if isinstance(holder, dict):
                holder[random.choice(WORDS)] = holder.pop(key)
                return f"{where}: renamed"
            holder.append(holder[key])
            return f"{where}: twice"
        case 2:
            other = random.choice(keys)
            holder[key], holder[other] = holder[other], holder[key]
            return f"{where}: exchanged with {str(other)[:60]}"
        case 3 if type(holder[key]) in (int, float):
            holder[key] = random.choice(
                (holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key], str(holder[key]))
            )
        case 4 if isinstance(holder[key], str):
            text = holder[key]
            holder[key] = random.choice((text + "x", text[:-1], text.upper(), text * 2, "../" + text, text + "\0"))
        case _:
            holder[key] = _hostile_value(random)
    return f"{where}: {ascii(holder[key])[:80]}"


def _hostile_value(random: Random) -> Any:
    match random.randrange(6):
        case 0 | 1:
            return random.choice(NUMBERS)
        case 2:
            return random.choice(WORDS)
        case 3:
            return random.choice((None, True, False))
        case 4:
            return copy.deepcopy(random.choice(([], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"b": []}})))
        case _:
            return [random.choice((*NUMBERS, *WORDS)) for _ in range(random.randrange(4))]


def _odd_json_text(random: Random, text: str) -> str:
    return random.choice(
        (
            "",
            "[" * 100_000,
            '{"a":' * 5_000,
            "\ufeff" + text,
            text + text,
            text + " " * 1000,
            " " * 7 + text,
            text.replace('": ', '": -', 1),
            text.replace("{", '{"twice": 1, "twice": 2, ', 1),
            text[:-1] + f', "much": {"9" * 5_000}' + "}",
            text[:-1] + ', "odd": 1e99999, "nan": NaN}',
            "null",
            "3",
            f"[{text}]",
        )
    )


def _damage_weights(random: Random, data: bytearray) -> str:
    place = random.randrange(len(data) // 4) * 4
    pattern, said = random.choice(
        (
            (struct.pack("<f", float("nan")), "NaN"),
            (struct.pack("<f", float("inf")), "infinity"),
            (struct.pack("<f", 3e38), "3e38"),
            (struct.pack("<f", 1e30) * 8, "1e30"),
            (bytes(4096), "zeros"),
            (b"\1\0\0\0" * 16, "denormals"),
        )
    )
    data[place : place + len(pattern)] = pattern[: len(data) - place]
    return f"{said} at {place}"


def _change_tensor(random: Random, header: dict[str, Any], name: str) -> str:
    entry = header[name]
    match random.randrange(5):
        case 0:
            entry["dtype"] = random.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64"))
            return f"{name}: {entry['dtype']}"
        case 1:
            entry["shape"] = random.choice(([], entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 0], [0]))
            return f"{name}: {entry['shape']}"
        case 2:
            axis = random.randrange(len(entry["shape"]))
            entry["shape"][axis] += random.choice((-1, 1, 2))
            return f"{name}: {entry['shape']}"
        case 3:
            del header[name]
            return f"{name}: left out"
        case _:
            new = random.choice(
                (*WORDS, "model.layers.7.mlp.up_proj.weight", name + "_scale", "model.routers.1.weight")
            )
            header[new] = header.pop(name)
            return f"{name}: renamed {ascii(new)[:60]}"


def _laid_out(header: dict[str, Any], data: bytearray) -> bytearray:
    """The tensors' bytes one after the other, their offsets in the header as they are then."""
    widths = {"F64": 8, "I64": 8, "C64": 8, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F4": 1}
    laid = bytearray()
    for name, entry in header.items():
        if name != "__metadata__":
            size = widths.get(entry["dtype"], 4)
            for axis in entry["shape"]:
                size *= axis
            start = entry["data_offsets"][0]
            entry["data_offsets"] = [len(laid), len(laid) + size]
            laid += data[start : start + size].ljust(size, b"\0")
    return laid


def _node(random: Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return random.choice(model.graph.node)


def _remove_node(random: Random, model: onnx.ModelProto) -> str:
    node = _node(random, model)
    said = f"without {node.op_type} {node.name}"
    model.graph.node.remove(node)
    return said


def _repeat_node(random: Random, model: onnx.ModelProto) -> str:
    node = _node(random, model)
    model.graph.node.insert(random.randrange(len(model.graph.node)), node)
    return f"{node.op_type} {node.name} twice"


def _move_node(random: Random, model: onnx.ModelProto) -> str:
    node = onnx.NodeProto()
    place = random.randrange(len(model.graph.node))
    node.CopyFrom(model.graph.node[place])
    del model.graph.node[place]
    model.graph.node.insert(random.randrange(len(model.graph.node) + 1), node)
    return f"{node.op_type} {node.name} moved"


def _rewire(random: Random, model: onnx.ModelProto) -> str:
    node = _node(random, model)
    others = [*node.output, *_node(random, model).output, *_node(random, model).input, "", "nowhere"]
    others += [value.name for value in (*model.graph.input, *model.graph.initializer)]
    field = random.choice((node.input, node.input, node.input, node.output))
    new = random.choice(others)
    if not field or random.random() < 0.1:
        field.append(new)
        return f"{node.op_type} {node.name}: {new!r} added"
    place = random.randrange(len(field))
    said = f"{node.op_type} {node.name}: {field[place]!r} → {new!r}"
    if random.random() < 0.1:
        del field[place]
    else:
        field[place] = new
    return said


def _change_operator(random: Random, model: onnx.ModelProto) -> str:
    node = _node(random, model)
    said = f"{node.op_type} {node.name}"
    if random.random() < 0.3:
        node.domain = random.choice(("com.microsoft", "dlo", "ai.onnx", "x.y", "a" * 3000, "ai.onnx.ml", "\x1b[2J"))
    else:
        known = ("Add", "Mul", "MatMul", "Identity", "If", "Loop", "Constant", "Attention", "Reshape", "Cast", "Where")
        node.op_type = random.choice((*known, "", "NoSuchOp", _node(random, model).op_type))
    return f"{said}: {node.domain[:30]}::{node.op_type}"


def _change_attribute(random: Random, model: onnx.ModelProto) -> str:
    node = random.choice([node for node in model.graph.node if node.attribute] or model.graph.node)
    if not node.attribute or random.random() < 0.2:
        value = random.choice((1, -1, 2**40, 0.5, "text", [1, 2], [0.5], model.graph))
        name = random.choice(
            ("axis", "perm", "to", "value", "then_branch", "epsilon", "scale", "num_heads", "anything")
        )
        node.attribute.append(onnx.helper.make_attribute(name, value))
        return f"{node.op_type} {node.name}: {name} added"
    attribute = random.choice(node.attribute)
    match random.randrange(5):
        case 0:
            node.attribute.remove(attribute)
        case 1:
            attribute.type = random.randrange(16)
        case 2:
            attribute.i = random.choice((0, 1, -1, 5, -5, 2**31, -(2**63), 2**63 - 1, 1000))
            attribute.f = random.choice((0.0, -1.0, 1e30, float("nan")))
        case 3:
            attribute.ints.append(random.choice((0, -1, 2**62)))
        case _:
            attribute.name = random.choice(("", "axis", "other"))
    return f"{node.op_type} {node.name}: attribute {attribute.name}"


def _change_tensor_proto(random: Random, model: onnx.ModelProto) -> str:
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    tensor = random.choice(tensors)
    external = {entry.key: entry for entry in tensor.external_data}
    said = f"tensor {tensor.name}"
    match random.randrange(9):
        case 0 if tensor.dims:
            axis = random.randrange(len(tensor.dims))
            tensor.dims[axis] = random.choice((0, 1, -1, tensor.dims[axis] + 1, 2**40, 2**62, tensor.dims[axis] * 2))
        case 1:
            tensor.dims.append(random.choice((0, 1, 2, -1, 2**62)))
        case 2:
            tensor.data_type = random.randrange(-1, 30)
        case 3:
            tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
        case 4 if "location" in external:
            external["location"].value = random.choice((*(word for word in WORDS if word != "\ud800"), "model.onnx"))
        case 5 | 6 if external:
            key = random.choice([key for key in external if key != "location"] or ["location"])
            external[key].value = random.choice((*map(str, SIZES), "-1", "x", "", "0x10", "1e3", " 4", "9" * 5000))
        case 7:
            tensor.name = random.choice(("", "input_ids", random.choice(tensors).name, random.choice(tensors).name))
        case _ if tensor.name in {kept.name for kept in model.graph.initializer}:
            kept = [initializer for initializer in model.graph.initializer if initializer.name != tensor.name]
            del model.graph.initializer[:]
            model.graph.initializer.extend(kept)
            return f"{said}: left out"
        case _:
            tensor.ClearField("raw_data")
    return f"{said} → {tensor.name} {list(tensor.dims)} {tensor.data_type}"


def _change_interface(random: Random, model: onnx.ModelProto) -> str:
    side = random.choice((model.graph.input, model.graph.output))
    value = random.choice(side)
    said = f"value {value.name}"
    tensor = value.type.tensor_type
    match random.randrange(7):
        case 0:
            side.remove(value)
            return f"{said}: left out"
        case 1:
            side.append(value)
            return f"{said}: twice"
        case 2:
            value.name = random.choice(("", "anything", random.choice(side).name, "past_key_values.9.key", "logits"))
        case 3:
            tensor.elem_type = random.randrange(-1, 30)
        case 4 if tensor.shape.dim:
            random.choice(tensor.shape.dim).dim_value = random.choice((0, 1, -1, 3, 2**62))
        case 5 if tensor.shape.dim:
            random.choice(tensor.shape.dim).dim_param = random.choice(("", "batch", "a" * 2000, "x y"))
        case _:
            value.ClearField("type")
    return f"{said} changed"


def _change_model(random: Random, model: onnx.ModelProto) -> str:
    match random.randrange(7):
        case 0:
            model.ir_version = random.choice((-1, 0, 1, 3, 7, 99, 2**62))
        case 1 if model.opset_import:
            random.choice(model.opset_import).version = random.choice((-1, 0, 1, 7, 13, 21, 24, 99, 2**62))
        case 2:
            del model.opset_import[:]
        case 3:
            entry = model.metadata_props.add()
            entry.key = random.choice(("dlo.passes", "dlo.version", "dlo", "", "producer"))
            entry.value = random.choice(("{}", "[]", "null", "x", "", "a" * 5_000, '[["RouteLayersPass", {}]]'))
        case 4:
            entry = random.choice((_node(random, model), model.graph)).metadata_props.add()
            entry.key = random.choice(("dlo.pass", "dlo.layer", "dlo.closes", "dlo.role", "dlo.origin", "dlo.mask"))
            entry.value = random.choice(("", "0", "1", "-1", "x", "mlp", "router_scores.0", "RouteLayersPass"))
        case 5:
            for node in model.graph.node:
                node.name = random.choice(("", "same"))
        case _:
            function = model.functions.add(name="Anything", domain="x.y")
            function.node.append(_node(random, model))
    return "the model itself"


_GRAPH_CHANGES: tuple[Callable[[Random, onnx.ModelProto], str], ...] = (
    _remove_node,
    _repeat_node,
    _move_node,
    _rewire,
    _rewire,
    _change_operator,
    _change_attribute,
    _change_tensor_proto,
    _change_tensor_proto,
    _change_interface,
    _change_model,
)
