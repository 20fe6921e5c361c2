"""The table of element types holds the words of the libraries themselves."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx
import torch
from safetensors.torch import save

from dlo_export.checkpoints import dtypes
from dlo_export.checkpoints.dtype_options import DTYPE_CHOICES
from dlo_export.checkpoints.dtypes import ELEMENT_TYPES, FLOATS, ElementType

kinds = pytest.mark.parametrize("kind", ELEMENT_TYPES, ids=lambda kind: kind.name)


@kinds
def test_words_are_onnxs_when_a_type_is_looked_up_there(kind: ElementType) -> None:
    number = onnx.TensorProto.DataType.Value(kind.onnx.upper())
    assert number == kind.onnx_number
    assert ir.DataType(number).numpy() == kind.numpy
    assert onnx.helper.np_dtype_to_tensor_dtype(kind.numpy) == number
    assert ir.DataType(number).itemsize == kind.itemsize


@kinds
def test_words_are_pytorchs_and_safetensors_when_a_tensor_is_saved(kind: ElementType) -> None:
    content = save({"t": torch.zeros(3, dtype=getattr(torch, kind.name))})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["t"]["dtype"] == kind.safetensors
    start, stop = header["t"]["data_offsets"]
    assert stop - start == 3 * kind.itemsize


@kinds
def test_words_are_tensorrts_when_it_has_the_type(kind: ElementType) -> None:
    if kind.tensorrt is not None:
        assert getattr(tensorrt_rtx.DataType, kind.tensorrt).itemsize == kind.itemsize


@pytest.mark.parametrize(
    ("table", "word"),
    [("BY_NAME", "name"), ("BY_ONNX", "onnx"), ("BY_SAFETENSORS", "safetensors"), ("BY_NUMPY", "numpy")],
)
def test_no_type_is_lost_when_types_are_looked_up_by_a_word(table: str, word: str) -> None:
    found = getattr(dtypes, table)
    assert len(found) == len(ELEMENT_TYPES)
    assert all(found[getattr(kind, word)] is kind for kind in ELEMENT_TYPES)


def test_options_are_the_floats_that_a_command_offers() -> None:
    assert tuple(dtypes.BY_OPTION) == DTYPE_CHOICES[1:]
    assert tuple(dtypes.BY_OPTION.values()) == FLOATS
    assert dtypes.BY_TENSORRT["HALF"].numpy == np.float16
