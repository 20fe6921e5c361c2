"""The step that benchmarks time is the step that the runner runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.onnxruntime_worker import DecoderStep
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.tiny_models import save_tiny_llama

LENGTH = 33


@pytest.mark.parametrize("model_type", ["llama_dlo_exattn", "llama_dlo"])
@pytest.mark.parametrize("sequence", [1, LENGTH], ids=["decode", "prefill"])
def test_step_computes_what_the_runner_does_when_it_is_run_again(
    tmp_path: Path, model_type: str, sequence: int
) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True], model_type=model_type)
    export_model(ExportRequest(str(model), tmp_path / "out", parity=False), Reporter())
    tokens = np.random.default_rng(0).integers(0, 97, (1, LENGTH))
    step = DecoderStep(tmp_path / "out" / "model.onnx", tokens, sequence, threads=1)
    scratch = [np.full((1, 2, LENGTH, 8), np.nan, np.float32) for _ in range(64)]  # what freed memory is taken for
    step()
    step()
    assert scratch
    with OnnxRuntimeRunner(tmp_path / "out" / "model.onnx") as runner:
        runner.reset(1)
        for start, stop in ((0, LENGTH - sequence), (LENGTH - sequence, LENGTH)):
            if start < stop:
                positions = np.arange(start, stop)[np.newaxis]
                result = runner.step(tokens[:, start:stop], np.ones((1, stop), np.int64), positions)
    np.testing.assert_allclose(step.outputs()["logits"], result.logits, rtol=0, atol=1e-5)
