"""What benchmarks time is what the graph computes."""

import gc

import numpy as np
import pytest

from benchmarks.common.onnxruntime_worker import DecoderStep
from dlo_export.checkpoints.interface import LOGITS
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.tiny_models import save_tiny_llama


@pytest.mark.parametrize("sequence", [1, 3])
@pytest.mark.parametrize(
    "routed", [{}, {"routed": [True, False] * 4, "model_type": "llama_dlo"}], ids=["dense", "routed"]
)
def test_step_reads_the_cache_that_its_first_tokens_wrote(tmp_path, sequence, routed):
    model = save_tiny_llama(tmp_path / "model", heads=3, kv_heads=3, hidden=96, head_dim=64, layers=8, **routed)
    export_model(ExportRequest(str(model), tmp_path / "out", parity=False), Reporter())
    graph = tmp_path / "out" / "model.onnx"
    tokens = np.random.default_rng(0).integers(0, 97, (2, 101))
    step = DecoderStep(graph, tokens, sequence, threads=1)
    gc.collect()
    _reused = [np.full((2, 3, 100, 64), 7, np.float32) for _ in range(64)]  # where freed memory would be given away
    step()
    with OnnxRuntimeRunner(graph, threads=1) as runner:
        runner.reset(2)
        ones, positions = np.ones_like(tokens), np.tile(np.arange(tokens.shape[1]), (2, 1))
        expected = runner.step(tokens, ones, positions).logits[:, -sequence:]
    np.testing.assert_allclose(step.outputs()[LOGITS], expected, atol=1e-5)


@pytest.mark.parametrize("sequence", [1, 9])
def test_step_reads_the_cache_that_its_first_tokens_wrote_when_it_is_written_in_place(tmp_path, sequence):
    model = save_tiny_llama(tmp_path / "model", hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16)
    tokens, logits = np.random.default_rng(0).integers(0, 97, (1, 9)), []
    for slots in (None, 12):
        request = ExportRequest(str(model), tmp_path / f"{slots}", parity=False, static_cache=slots)
        export_model(request, Reporter())
        step = DecoderStep(request.output / "model.onnx", tokens, sequence, threads=1)
        for _ in range(2):  # the second reads the cache as the first left it
            step()
        logits.append(step.outputs()[LOGITS])
    np.testing.assert_allclose(*logits, atol=1e-5)
