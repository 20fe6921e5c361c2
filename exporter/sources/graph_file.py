"""Reads a `.onnx` file as a graph: one of ours, or anybody's to be looked at."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.sources.model_proto import parsed_model
from dlo_export.exporter.sources.proto_parts import tensor_problems


def load_graph(path: Path) -> ir.Model:
    """Reads a graph; external weights are mapped when they are asked for.

    Raises:
        InputError: It is no ONNX model, or a damaged one.
    """
    proto = parsed_model(path)
    if problems := list(tensor_problems(proto)):
        raise InputError(f"{path}: is damaged:\n  " + "\n  ".join(problems), hint="export it again")
    try:
        model = ir.from_proto(proto)
    except Exception as err:  # onnx_ir's own errors have no common base; each means that the model is not a graph
        raise InputError(
            f"{path}: is not a readable ONNX model ({type(err).__name__}: {err})", hint="export it again"
        ) from err
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model
