"""Reading a `.onnx` file of unknown origin: everything it refers to is checked before anything is computed from it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.files.file_inside import file_inside
from dlo_export.exporter.sources.model_proto import parsed_model
from dlo_export.exporter.sources.proto_parts import check_tensor, graphs_of, nodes_of, placed_tensors
from dlo_export.exporter.weight_file import INLINE_BYTES
from dlo_export.runtimes.onnxruntime.operators import DOMAIN

_ONNX = "ai.onnx"
_OWN_METADATA = "dlo."


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """A model as it was read.

    Attributes:
        model: Its large external weights are mapped when they are asked for; small ones, which stay inside the file
            that is written, were read.
        data_files: The external data files it refers to: where they lie, links followed, and their paths relative to
            the graph's folder, in the order of those.
        routed: Layers that it says have routers of this project already.
    """

    model: ir.Model
    data_files: dict[Path, str]
    routed: str


def read_foreign_file(path: Path, *, for_inspection: bool = False) -> ForeignFile:
    """Reads a graph that anybody may have written.

    Metadata of this project's passes is left out: it tells what passes did to the graph, and for a graph from outside
    nobody vouches for it.

    Args:
        path: The file.
        for_inspection: Nothing is to be made of it: data files need not be there, and a graph that says it is of this
            project may say what its passes did.

    Raises:
        InputError: It is no ONNX model, of a version this project does not know, or holds tensors or references that
            cannot be; with all problems and their places.
    """
    proto = parsed_model(path)
    _use_one_name_of_onnx(proto)
    _import_what_onnxruntime_does(proto)
    problems = [*_version_problems(proto), *_name_problems(proto), *_attribute_problems(proto)]
    data_files: dict[str, Path] = {}
    of_files: dict[str, str] = {}  # what is wrong with a file is said once, with the first tensor that refers to it
    for place, tensor, in_constant in placed_tensors(proto):
        try:
            check_tensor(tensor)
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                location, file = _settle_external(path, tensor, stays_external=in_constant)
                data_files[location] = file
        except CheckpointError as err:
            if for_inspection:
                continue
            of_files.setdefault(err.message, f"{place} '{tensor.name}'")
        except (ValueError, OSError, RuntimeError) as err:  # of what a path can be: no name, too long, a loop of links
            problems.append(f"{place} '{tensor.name}': {err}")
    problems += [f"{first}: {said}" for said, first in of_files.items()]
    if problems:
        raise InputError(
            f"{path}: is not usable:\n  " + "\n  ".join(problems),
            hint="export it again, and keep all files of the export together in one folder",
        )
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    routed = metadata.get("routed_layers", "") if proto.producer_name == "dlo-export" else ""
    if proto.producer_name != "dlo-export" or not for_inspection:
        _forget_own_metadata(proto)
    if proto.producer_name == "dlo-export":
        proto.ClearField("producer_name")  # whoever had the file since may have changed it: it is a stranger's graph
    try:
        model = ir.from_proto(proto)
    except Exception as err:  # onnx_ir's own errors have no common base; each means that the model is not a graph
        raise InputError(f"{path}: is no valid graph: {_root_cause(err)}", hint="export it again") from err
    # Of a file that has several names, links or "./", the last one is as good as any.
    by_place = {file: location for location, file in sorted(data_files.items())}
    return ForeignFile(model, by_place, routed)


def _version_problems(proto: onnx.ModelProto) -> Iterator[str]:
    if proto.ir_version > onnx.IR_VERSION:
        yield f"its IR version is {proto.ir_version}, this version of onnx knows {onnx.IR_VERSION} and older"
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if not entry.domain and not 1 <= entry.version <= newest:
            yield f"its opset is {entry.version}, this version of onnx knows 1 to {newest}"


def _name_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """What onnx_ir would silently give to the last of the same name, and an interface or shapes that no array has."""
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type.tensor_type
        if not kind.elem_type or not kind.HasField("shape"):
            yield f"the graph's '{value.name}': has no element type or no shape, expected those of a tensor"
    for graph in graphs_of(proto):
        kinds: Sequence[tuple[str, Iterable[str]]] = (
            ("input", (value.name for value in graph.input)),
            ("output", (value.name for value in graph.output)),
            ("initializer", (tensor.name for tensor in graph.initializer)),
        )
        for kind, names in kinds:
            for name, count in Counter(names).items():
                if count > 1 or not name:
                    yield f"graph '{graph.name}': {count} {kind}s are called '{name}'"
        if graph.sparse_initializer:
            yield f"graph '{graph.name}': has sparse initializers, expected dense ones"
        for value in (*graph.input, *graph.output, *graph.value_info):
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
            if any(dim < 0 for dim in dims):
                yield f"value '{value.name}': has dimensions {dims}, expected none below 0"


def _attribute_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Attributes that are there twice, and such of other types than ONNX's operators declare: passes read them."""
    version = next((entry.version for entry in proto.opset_import if not entry.domain), 0)
    for node in nodes_of(proto):
        for name, count in Counter(attribute.name for attribute in node.attribute).items():
            if count > 1 or not name:
                yield f"{node.op_type} node '{node.name}': {count} attributes are called '{name}'"
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED:
                yield f"{node.op_type} node '{node.name}': attribute '{attribute.name}' has no type"
                continue
            found = onnx.AttributeProto.AttributeType.Name(attribute.type)
            expected = found if node.domain else _declared_types(node.op_type, version).get(attribute.name, found)
            if found != expected:
                yield f"{node.op_type} node '{node.name}': attribute '{attribute.name}' is {found}, expected {expected}"


@functools.cache
def _declared_types(op_type: str, version: int) -> dict[str, str]:
    """Types of an ONNX operator's attributes by their names; of one that there is not, the checker tells later."""
    try:
        schema = onnx.defs.get_schema(op_type, version)
    except onnx.defs.SchemaError:
        return {}
    # onnx's stubs do not know that its enumeration has names.
    return {name: attribute.type.name for name, attribute in schema.attributes.items()}  # type: ignore[attr-defined]


def _settle_external(path: Path, tensor: onnx.TensorProto, *, stays_external: bool) -> tuple[str, Path]:
    """Checks a reference to a data file, and makes it one that holds wherever the model is written.

    A large constant refers to its file by the full path. What will be written inside the .onnx file, a small one or a
    tensor in an attribute, is read: such a reference would mean other bytes beside the file that is written.

    Returns:
        What it calls the data file, and where that lies, links followed.

    Raises:
        ValueError: There is no such file inside the folder, or the tensor does not lie inside it.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or "\0" in location or Path(location).is_absolute():
        raise ValueError(f"its data lie at {location!r}, expected a path relative to the graph's folder")
    file = file_inside(path.parent, location)
    size = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    if length != size:
        raise ValueError(f"{list(tensor.dims)} says it has {length} bytes in {file}, expected {size}")
    if offset < 0 or offset + size > (available := file.stat().st_size):
        found = "" if offset < 0 else f", which has {available} bytes"
        raise ValueError(f"lies at {offset} to {offset + size} of {file}{found}")
    if stays_external and size > INLINE_BYTES:
        del tensor.external_data[:]
        for key, value in (("location", file.resolve()), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    else:
        with file.open("rb") as data:
            data.seek(offset)
            tensor.raw_data = data.read(size)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    return location, file.resolve()


def _use_one_name_of_onnx(proto: onnx.ModelProto) -> None:
    """ONNX's own domain has two names, "" and "ai.onnx": passes look for the shorter one."""
    for node in nodes_of(proto):
        if node.domain == _ONNX:
            node.domain = ""
    for holder in (proto, *proto.functions):
        imported = {entry.version for entry in holder.opset_import if not entry.domain}
        for entry in [entry for entry in holder.opset_import if entry.domain == _ONNX]:
            if entry.version in imported:
                holder.opset_import.remove(entry)
            else:
                entry.domain = ""  # beside another version, which the checker tells of


def _import_what_onnxruntime_does(proto: onnx.ModelProto) -> None:
    """A graph that uses ONNX Runtime's own operators need not import their domain: ONNX Runtime imports it itself."""
    used = {node.domain for graph in graphs_of(proto) for node in graph.node}
    if DOMAIN in used - {entry.domain for entry in proto.opset_import}:
        proto.opset_import.add(domain=DOMAIN, version=1)


def _forget_own_metadata(proto: onnx.ModelProto) -> None:
    graphs = list(graphs_of(proto))
    values = [value for graph in graphs for value in (*graph.input, *graph.output, *graph.value_info)]
    for holder in (proto, *proto.functions, *graphs, *nodes_of(proto), *values):
        for entry in [entry for entry in holder.metadata_props if entry.key.startswith(_OWN_METADATA)]:
            holder.metadata_props.remove(entry)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)
