"""ONNX Runtime's own operators, as it declares them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

DOMAIN = "com.microsoft"
# Operators of ONNX Runtime that it registers in ONNX's domain, where ONNX knows none of these names.
IN_ONNX_DOMAIN = frozenset({"SimplifiedLayerNormalization"})


@dataclasses.dataclass(frozen=True)
class Operator:
    """What a node of an operator may have.

    Attributes:
        attributes: Type of each by its name, as ONNX calls it: "INT", "FLOATS", ….
        required: Attributes that have no default.
        inputs: The smallest and the largest number of them.
        outputs: Likewise.
        input_types: Of each input, the letter that inputs of one type share, "" where any number of them may each be
            of another, and which types it stands for.
        output_letters: The letter of each output, which it shares with the inputs that are of its type.
    """

    attributes: Mapping[str, str]
    required: frozenset[str]
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    input_types: tuple[tuple[str, frozenset[str]], ...]
    output_letters: tuple[str, ...]


@functools.cache
def own_operators() -> Mapping[str, Operator]:
    """By name, those of the installed ONNX Runtime."""
    # Imported here: what meets no graph of somebody else's starts in less time and memory without it.
    from onnxruntime.capi import onnxruntime_pybind11_state as ort  # noqa: PLC0415

    schemas = [
        schema
        for schema in ort.get_all_operator_schema()
        if schema.domain == DOMAIN or (not schema.domain and schema.name in IN_ONNX_DOMAIN)
    ]
    return {
        schema.name: Operator(
            {name: attribute.type.name for name, attribute in schema.attributes.items()},
            frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
            (schema.min_input, schema.max_input),
            (schema.min_output, schema.max_output),
            tuple((_letter(each), frozenset(map(_element_type, each.types))) for each in schema.inputs),
            tuple(map(_letter, schema.outputs)),
        )
        for schema in schemas
    }


def declared_by_onnxruntime(domain: str, op_type: str) -> Operator | None:
    """The declaration of an operator of ONNX Runtime's own; None for every other one."""
    own = domain == DOMAIN or (not domain and op_type in IN_ONNX_DOMAIN)
    return own_operators().get(op_type) if own else None


def _letter(parameter: Any) -> str:
    """Of an input or output, as ONNX Runtime declares it."""
    return parameter.typeStr if parameter.isHomogeneous else ""


def _element_type(type_: str) -> str:
    """Of a tensor: float16 for tensor(float16)."""
    return type_.removeprefix("tensor(").removesuffix(")")
