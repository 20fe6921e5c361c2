"""What the table says ONNX Runtime's CPU provider lacks, asked of ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.dtypes import BFLOAT16, BY_OPTION, FLOAT16, FLOAT32
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.named_operators import named_operators
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.exporter.weight_file import save_weights
from dlo_export.runtimes.errors import ModelLoadError, StepError
from dlo_export.runtimes.onnxruntime.providers import CPU, CUDA, SKIP_GATE_UP
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.runtimes.feeding import feed
from tests.tiny_models import save_tiny_llama


@pytest.mark.parametrize("lowering", ["compact", "if", "masked"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_gaps_of_the_cpu_are_there_when_onnxruntime_is_asked(tmp_path, dtype, lowering):
    source = open_source(save_tiny_llama(tmp_path / "model", routed=[True, False], layers=2), None)
    model = build_model(source, lowering, graph_dtype(dtype))
    save_weights(model, tmp_path / "model.onnx.data")
    ir.save(model, tmp_path / "model.onnx")
    wanted = CPU.why_not_run(BY_OPTION[dtype], named_operators(model))
    try:
        with OnnxRuntimeRunner(tmp_path / "model.onnx", threads=1) as runner:
            feed(runner, [np.arange(6)[np.newaxis]])
        found = None
    except (ModelLoadError, StepError) as err:
        found = str(err)
    assert (found is None) == (wanted is None), found
    if found is not None:
        assert "NOT_IMPLEMENTED" in found


def test_gap_counts_when_its_dtype_and_operator_are_those_of_the_graph():
    assert CPU.why_not_run(FLOAT32, {SKIP_GATE_UP}) is None
    assert CPU.why_not_run(FLOAT16) is None
    assert "computes float32 alone" in (CPU.why_not_run(FLOAT16, {SKIP_GATE_UP, "Add"}) or "")
    assert "bfloat16" in (CPU.why_not_run(BFLOAT16) or "")
    assert CUDA.why_not_run(BFLOAT16, {SKIP_GATE_UP}) is None
