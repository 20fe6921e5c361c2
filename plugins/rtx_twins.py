"""Python twins of the plugins for TensorRT-RTX: they describe and never compute.

TensorRT-RTX builds ahead of time and runs a plugin's dtype, shape and format functions while it does; with these twins
it does so without a compiled library (TensorRT interfaces IPluginV3OneCore, OneBuild, OneRuntime and
IPluginCreatorV3One). To run, an engine needs kernels: build it with the C++ library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorrt_rtx as trt

from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.graph_passes.spec.ops import PluginOp
from dlo_export.plugins.contract import SIZES_HINT, T_DTYPES, operand_dtypes, output_axes, size_problems
from dlo_export.plugins.errors import PluginError

DATA_TYPES = {kind.name: getattr(trt.DataType, kind.tensorrt or "") for kind in FLOATS}


class PluginTwin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
    """What one `dlo` operator looks like to TensorRT-RTX.

    Args:
        op: The operator.
    """

    def __init__(self, op: PluginOp) -> None:
        for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
            base.__init__(self)
        self.op = op
        self.num_outputs = len(op.outputs)
        self.plugin_name = op.name
        self.plugin_namespace = op.attributes["plugin_namespace"]
        self.plugin_version = op.attributes["plugin_version"]
        self._combinations = [[DATA_TYPES[dtype] for dtype in operand_dtypes(op, t_dtype)] for t_dtype in T_DTYPES]

    def get_capability_interface(self, type: Any) -> PluginTwin:
        """One object has all three capabilities."""
        return self

    def clone(self) -> PluginTwin:
        """A twin of the same operator; there is no other state."""
        return PluginTwin(self.op)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """The outputs' dtypes: those of the one combination that has these input dtypes.

        Raises:
            PluginError: None has.
        """
        inputs = len(self.op.inputs)
        for combination in self._combinations:
            if combination[:inputs] == list(input_types):
                return combination[inputs:]
        found = ", ".join(dtype.name for dtype in input_types)
        raise PluginError(
            f"dlo::{self.op.name} got inputs of types {found}; expected {self._accepted()}",
            hint="scale is fp32 always; weights and streams share one type",
        )

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """The outputs' dimension expressions, taken from the inputs' axes of the same names.

        Runs while the model is parsed, where TensorRT-RTX turns an exception into a parser error; refused later, in
        `configure_plugin`, it corrupts its heap (1.7.1.116). So sizes that are constants are judged here.
        """
        shapes = [[size.get_constant_value() if size.is_constant() else -1 for size in shape] for shape in inputs]
        self._refuse_bad_sizes(shapes)
        outputs = []
        for axes in output_axes(self.op):
            expressions = trt.DimsExprs(len(axes))
            for position, (index, axis) in enumerate(axes):
                expressions[position] = inputs[index][axis]
            outputs.append(expressions)
        return outputs

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Row-major tensors, T the same everywhere, scale in fp32."""
        dtypes = [entry.desc.type for entry in in_out[: pos + 1]]
        row_major = in_out[pos].desc.format == trt.TensorFormat.LINEAR
        return row_major and any(combination[: pos + 1] == dtypes for combination in self._combinations)

    def configure_plugin(self, inp: Sequence[Any], out: Sequence[Any]) -> None:
        """Refuses sizes the kernels do not serve that were not known while parsing."""
        self._refuse_bad_sizes([tuple(entry.desc.dims) for entry in inp])

    def get_workspace_size(self, inp: Sequence[Any], out: Sequence[Any]) -> int:
        """None: nothing is allocated between launches, which CUDA-graph capture relies on."""
        return 0

    def get_valid_tactics(self) -> list[int]:
        """None of its own: the tile follows from the number of tokens."""
        return []

    def set_tactic(self, tactic: int) -> None:
        """Nothing to choose."""

    def get_fields_to_serialize(self) -> Any:
        """No fields: everything a launch needs is in the tensors' shapes."""
        return trt.PluginFieldCollection([])

    def on_shape_change(self, inp: Sequence[Any], out: Sequence[Any]) -> None:
        """Nothing depends on shapes beforehand."""

    def attach_to_context(self, context: Any) -> PluginTwin:
        """A twin per execution context."""
        return self.clone()

    def enqueue(self, *arguments: Any) -> None:
        """Refuses: the kernels are in the C++ library.

        Raises:
            PluginError: Always.
        """
        raise PluginError(
            f"dlo::{self.op.name} was asked to run, but its Python twin only describes it",
            hint="load libdlo_plugins.so before the engine: plugins.registration.load_library(trt, path)",
        )

    def _refuse_bad_sizes(self, shapes: Sequence[Sequence[int]]) -> None:
        if problems := size_problems(self.op, shapes):
            raise PluginError("\n".join(problems), hint=SIZES_HINT)

    def _accepted(self) -> str:
        inputs = len(self.op.inputs)
        return " or ".join(
            "(" + ", ".join(dtype.name for dtype in combination[:inputs]) + ")" for combination in self._combinations
        )


class PluginTwinCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
    """Makes the twins of one operator; found by the parser by op_type, plugin_version and plugin_namespace.

    Args:
        op: The operator.
    """

    def __init__(self, op: PluginOp) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.op = op
        self.name = op.name
        self.plugin_namespace = op.attributes["plugin_namespace"]
        self.plugin_version = op.attributes["plugin_version"]
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name: str, fc: Any, phase: Any) -> PluginTwin:
        """A twin; `fc` holds no fields of ours and is not read."""
        return PluginTwin(self.op)
