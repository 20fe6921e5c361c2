"""Parses `.onnx` files, and tells what onnx_ir and protobuf would trip over later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.regular_file import regular_size

# onnx_ir logs what it finds strange, names as they are; what counts of it is refused here, in our words.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

LARGEST_FILE = 2**31 - 1  # bytes; protobuf reads no more


def parsed_model(path: Path) -> onnx.ModelProto:
    """Reads a `.onnx` file; external data stay where they are.

    Raises:
        InputError: It cannot be read, is no ONNX model, or holds text that is none.
    """
    proto = onnx.ModelProto()
    try:
        if (size := regular_size(path)) > LARGEST_FILE:
            raise InputError(
                f"{path}: has {size} bytes, a .onnx file has {LARGEST_FILE} at most",
                hint="export it with external data",
            )
        proto.ParseFromString(path.read_bytes())
    except InputError:
        raise
    except Exception as err:  # protobuf's two implementations have errors of their own
        raise InputError(f"{path}: is no ONNX model, or a damaged one ({err})", hint="export it again") from err
    if not proto.HasField("graph") or not proto.graph.node:
        raise InputError(f"{path}: holds no graph", hint="give a .onnx file of a model, complete")
    # protobuf reads what is not UTF-8 as bytes, and refuses to write it.
    if problems := list(_undecodable(proto, "")):
        raise InputError(
            f"{path}: is damaged, names in it are not UTF-8:\n  " + "\n  ".join(problems), hint="export it again"
        )
    return proto


def _undecodable(message: Any, place: str) -> Iterator[str]:
    for field, value in message.ListFields():
        values = value if field.is_repeated else (value,)
        if field.type == field.TYPE_STRING:
            yield from (f"{place}{field.name} {text!r}" for text in values if not isinstance(text, str))
        elif field.type == field.TYPE_MESSAGE:
            for number, inner in enumerate(values):
                index = f"[{number}]" if field.is_repeated else ""
                yield from _undecodable(inner, f"{place}{field.name}{index}.")
