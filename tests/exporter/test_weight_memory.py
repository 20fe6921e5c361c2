"""Memory of writing weights is a few chunks, however large a tensor is: nobody reads or makes one as a whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import onnx_ir as ir
import pytest

from dlo_export.checkpoints import lazy_tensors
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model, build_tensorrt_model
from dlo_export.exporter.weight_file import save_weights
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama

CHUNK, CHUNKS = 1 << 19, 4  # bytes of a chunk, and how many may be held: source, result, what is hashed, one to spare
SIZES = {
    "hidden": 128,
    "intermediate": 64,
    "vocab": 24_576,
    "layers": 1,
}  # an embedding of 24 chunks in float32, of 12 in bfloat16
# A transposed quantised matrix is written in whole blocks, 32 columns for all tokens: as large, and a chunk holds some.
WIDE = {**SIZES, "hidden": 1024, "vocab": 3072}
# How the embedding is stored in the source, whether it is the head too (else that is stored transposed), and in what
# type it is written.
FORMS = {
    "as it is, tied": ("float32", True, ir.DataType.FLOAT),
    "transposed head": ("float32", False, ir.DataType.FLOAT),
    "widened": ("bfloat16", False, ir.DataType.FLOAT),
    "narrowed, tied": ("float32", True, ir.DataType.BFLOAT16),
    "narrowed, transposed": ("float32", False, ir.DataType.BFLOAT16),
    "dequantised": ("Q8_0", False, ir.DataType.FLOAT),
    "dequantised, tied": ("Q8_0", True, ir.DataType.BFLOAT16),
}


@pytest.mark.parametrize("tensorrt", [False, True], ids=["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("form", FORMS)
def test_writing_holds_a_few_chunks_when_a_tensor_has_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, *, tensorrt: bool
) -> None:
    stored, tie, dtype = FORMS[form]
    quantised = stored == "Q8_0"
    sizes = WIDE if quantised and not tie else SIZES
    model = save_tiny_llama(tmp_path / "model", tie=tie, dtype="float32" if quantised else stored, **sizes)
    if quantised:
        model = save_tiny_gguf(model, tmp_path / "model.gguf", stored)
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", CHUNK)
    source = open_source(str(model), None)
    if tensorrt:
        graph = build_tensorrt_model(source, TensorRtOptions("none", max_cache=8, max_sequence=4), dtype)
    else:
        graph = build_model(source, "none", dtype)
    tracemalloc.start()
    try:
        size = save_weights(graph, tmp_path / "weights")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 2 * CHUNKS * CHUNK, "or nothing would be shown"
    assert peak < CHUNKS * CHUNK, f"{peak / CHUNK:.1f} chunks"


def test_a_tensor_that_is_read_whole_is_noticed(tmp_path: Path) -> None:
    """What the test above measures: in one chunk, an embedding that is cast is held as a whole."""
    source = open_source(str(save_tiny_llama(tmp_path / "model", dtype="bfloat16", **SIZES)), None)
    graph = build_model(source, "none", ir.DataType.FLOAT)
    tracemalloc.start()
    try:
        save_weights(graph, tmp_path / "weights")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 2 * CHUNKS * CHUNK
