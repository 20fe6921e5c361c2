from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt import engine_cache
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _own_engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(engine_cache.VARIABLE, str(tmp_path_factory.mktemp("engine_cache")))
        yield


@pytest.fixture(scope="session")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed model with an engine for TensorRT-RTX; heads of 64, which its fused attention has kernels for."""
    folder = tmp_path_factory.mktemp("artefacts")
    model = save_tiny_llama(
        folder / "model", hidden=128, heads=2, kv_heads=1, head_dim=64, layers=2, routed=(True, True), dtype="float16"
    )
    trt = TensorRtRequest("rtx", ("sm89",), max_batch=4, max_sequence=64, max_cache=128)
    export_model(ExportRequest(str(model), folder / "compact", lowering="compact", parity=False, trt=trt), Reporter())
    return folder / "compact"
