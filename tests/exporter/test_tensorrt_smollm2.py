"""The demo's model, 36 layers, as a TensorRT-RTX engine by `compact` in bf16; every lowering at its widths.

A build of this depth takes half a minute of a core for each GPU, so the other lowerings and the other 16-bit type are
built in four layers, for two GPUs; small models are built in every combination.
"""

import pytest

from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.export import build_planned_engines, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt
from tests.tiny_models import save_tiny_llama

MECHANISM = {"compact": {"TOPK"}, "if": {"CONDITION"}, "plugin": {"PLUGIN_V3"}}
WIDTHS = {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3}


def check_engine_skips_in_every_routed_layer(source, layers, lowering, dtype, folder, targets):
    """Builds it, and returns its record."""
    plan = plan_tensorrt(source, TensorRtRequest(backend="rtx", targets=targets), lowering, dtype)
    save_graphs(plan, folder, Reporter())
    (engine,) = build_planned_engines(plan, folder, Reporter())
    routed = set(source.routing.layers)
    source.close()
    skipping = engine.build.census.skipping
    assert {layer for layer, types in skipping.items() if MECHANISM[lowering] <= set(types)} == routed
    assert engine.build.census.total["KV_CACHE_UPDATE"] == 2 * layers
    return routed, engine


@pytest.mark.smollm2
def test_engine_is_built_with_the_skip_mechanism_in_every_routed_layer(
    smollm2_gguf, smollm2_tli_adapter, tmp_path, monkeypatch
):
    monkeypatch.setenv("DLO_EXPORT_CACHE", "")
    source = open_source(str(smollm2_gguf), smollm2_tli_adapter)
    routed, engine = check_engine_skips_in_every_routed_layer(source, 36, "compact", "bf16", tmp_path, ("sm120",))
    assert len(routed) > 20
    assert engine.file.stat().st_size > 200 * 2**20


@pytest.mark.parametrize(("lowering", "dtype"), [("compact", "fp16"), ("if", "bf16"), ("plugin", "fp16")])
def test_engine_of_the_same_widths_is_built_when_its_layers_are_few(tmp_path, monkeypatch, lowering, dtype):
    monkeypatch.setenv("DLO_EXPORT_CACHE", "")
    model = save_tiny_llama(tmp_path / "model", **WIDTHS, layers=4, tie=True, routed=[True, False, True, True])
    source = open_source(str(model), None)
    targets = ("sm89", "sm120")
    routed, _ = check_engine_skips_in_every_routed_layer(source, 4, lowering, dtype, tmp_path, targets)
    assert routed == {0, 2, 3}
