"""ONNX Runtime's own operators, as it declares them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

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
        input_types: Of each input, the letter that inputs of one type share, and which types it stands for.
    """

    attributes: Mapping[str, str]
    required: frozenset[str]
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    input_types: tuple[tuple[str, frozenset[str]], ...]


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
            tuple((each.typeStr, frozenset(map(_element_type, each.types))) for each in schema.inputs),
        )
        for schema in schemas
    }


def _element_type(type_: str) -> str:
    """Of a tensor: float16 for tensor(float16)."""
    return type_.removeprefix("tensor(").removesuffix(")")
