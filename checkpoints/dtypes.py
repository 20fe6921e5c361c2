"""Element types and the words every format and runtime has for them: the one table.

`name` is the word of NumPy, PyTorch and config.json, `option` the command line's, `onnx` ONNX's in lower case (ONNX
Runtime writes "tensor(float)"), `safetensors` that format's (GGUF's unquantised types have the same), `tensorrt` the
member's of `trt.DataType`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from dlo_export.checkpoints.dtype_options import BF16, FP16, FP32


@dataclass(frozen=True)
class ElementType:
    """One element type.

    Attributes:
        name: "float32".
        option: "fp32" for the types that `--dtype` offers, else None.
        onnx: "float".
        onnx_number: 1, of ONNX's TensorProto.DataType.
        safetensors: "F32".
        tensorrt: "FLOAT", None where TensorRT has none.
        numpy: Of arrays; bfloat16 and the 8-bit floats are ml_dtypes'.
    """

    name: str
    option: str | None
    onnx: str
    onnx_number: int
    safetensors: str
    tensorrt: str | None
    numpy: np.dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize


FLOAT32 = ElementType("float32", FP32, "float", 1, "F32", "FLOAT", np.dtype(np.float32))
FLOAT16 = ElementType("float16", FP16, "float16", 10, "F16", "HALF", np.dtype(np.float16))
BFLOAT16 = ElementType("bfloat16", BF16, "bfloat16", 16, "BF16", "BF16", np.dtype(ml_dtypes.bfloat16))
INT64 = ElementType("int64", None, "int64", 7, "I64", "INT64", np.dtype(np.int64))
INT32 = ElementType("int32", None, "int32", 6, "I32", "INT32", np.dtype(np.int32))
UINT16 = ElementType("uint16", None, "uint16", 4, "U16", None, np.dtype(np.uint16))
BOOL = ElementType("bool", None, "bool", 9, "BOOL", "BOOL", np.dtype(np.bool_))

FLOATS = (FLOAT32, FLOAT16, BFLOAT16)
"""What weights, caches and logits may be."""

ELEMENT_TYPES: tuple[ElementType, ...] = (
    *FLOATS,
    INT64,
    INT32,
    BOOL,
    ElementType("float64", None, "double", 11, "F64", None, np.dtype(np.float64)),
    ElementType("float8_e4m3fn", None, "float8e4m3fn", 17, "F8_E4M3", "FP8", np.dtype(ml_dtypes.float8_e4m3fn)),
    ElementType("float8_e5m2", None, "float8e5m2", 19, "F8_E5M2", None, np.dtype(ml_dtypes.float8_e5m2)),
    ElementType("int16", None, "int16", 5, "I16", None, np.dtype(np.int16)),
    ElementType("int8", None, "int8", 3, "I8", "INT8", np.dtype(np.int8)),
    ElementType("uint64", None, "uint64", 13, "U64", None, np.dtype(np.uint64)),
    ElementType("uint32", None, "uint32", 12, "U32", None, np.dtype(np.uint32)),
    UINT16,
    ElementType("uint8", None, "uint8", 2, "U8", "UINT8", np.dtype(np.uint8)),
)

BY_NAME = {kind.name: kind for kind in ELEMENT_TYPES}
BY_OPTION = {kind.option: kind for kind in ELEMENT_TYPES if kind.option is not None}
BY_ONNX = {kind.onnx: kind for kind in ELEMENT_TYPES}
BY_SAFETENSORS = {kind.safetensors: kind for kind in ELEMENT_TYPES}
BY_TENSORRT = {kind.tensorrt: kind for kind in ELEMENT_TYPES if kind.tensorrt is not None}
BY_NUMPY = {kind.numpy: kind for kind in ELEMENT_TYPES}
