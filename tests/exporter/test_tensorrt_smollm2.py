"""The demo's model, 36 layers, as TensorRT-RTX engines: every lowering, what `auto` chooses in both 16-bit types."""

import pytest

from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.export import build_planned_engines, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt

pytestmark = pytest.mark.smollm2

MECHANISM = {"compact": {"TOPK"}, "if": {"CONDITION"}, "plugin": {"PLUGIN_V3"}}


# A build of this depth takes half a minute of a core; small models are built in every combination.
@pytest.mark.parametrize(
    ("lowering", "dtype"), [("compact", "bf16"), ("compact", "fp16"), ("if", "bf16"), ("plugin", "fp16")]
)
def test_engine_is_built_with_the_skip_mechanism_in_every_routed_layer(
    smollm2_gguf, smollm2_tli_adapter, tmp_path, monkeypatch, lowering, dtype
):
    monkeypatch.setenv("DLO_EXPORT_CACHE", "")
    source = open_source(str(smollm2_gguf), smollm2_tli_adapter)
    request = TensorRtRequest(backend="rtx", targets=("sm89", "sm120"))
    plan = plan_tensorrt(source, request, lowering, dtype)
    save_graphs(plan, tmp_path, Reporter())
    (engine,) = build_planned_engines(plan, tmp_path, Reporter())
    routed = set(source.routing.layers)
    source.close()
    assert len(routed) > 20
    skipping = engine.build.census.skipping
    assert {layer for layer, types in skipping.items() if MECHANISM[lowering] <= set(types)} == routed
    assert engine.build.census.total["KV_CACHE_UPDATE"] == 2 * 36
    assert engine.file.stat().st_size > 200 * 2**20
