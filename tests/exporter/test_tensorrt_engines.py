"""Engines of graphs as the exporter makes them: every lowering passes every check and skips in every routed layer."""

import json
from pathlib import Path

import pytest

from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.engines import build_engines
from dlo_export.exporter.tensorrt.export import build_planned_engines, engine_request, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.tensorrt.engine_check import obstacles
from tests.tiny_models import save_tiny_llama

REFERENCE = Path(__file__).parents[1] / "data" / "reference_mlp_routed"
SIZES = {"max_batch": 2, "max_sequence": 16, "max_cache": 32}


@pytest.fixture(scope="module")
def source():
    source = open_source(str(REFERENCE), None)
    yield source
    source.close()


@pytest.mark.parametrize(
    ("lowering", "dtype", "options", "mechanism"),
    [
        ("compact", "bf16", {"targets": ("sm89", "sm120")}, {"TOPK", "GATHER", "SCATTER"}),
        ("compact", "fp16", {"cache": "growing"}, {"TOPK", "GATHER", "SCATTER"}),
        ("if", "fp16", {"split": True}, {"CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT"}),
        ("plugin", "bf16", {"last_logits": True}, {"PLUGIN_V3"}),
        ("plugin", "fp32", {}, {"PLUGIN_V3"}),
    ],
    ids=["compact-bf16", "compact-fp16-growing", "if-fp16-split", "plugin-bf16-last-logits", "plugin-fp32"],
)
def test_build_engines_skips_in_every_routed_layer(source, tmp_path, lowering, dtype, options, mechanism):
    plan = plan_tensorrt(source, TensorRtRequest(backend="rtx", **SIZES, **options), lowering, dtype)
    save_graphs(plan, tmp_path, Reporter())
    records = build_planned_engines(plan, tmp_path, Reporter())
    assert len(records) == len(plan.engines)
    for record in records:
        assert source.routing is not None
        assert {layer: set(found) for layer, found in record.build.census.skipping.items()} == dict.fromkeys(
            source.routing.layers, mechanism
        )
        assert record.build.targets == options.get("targets", ())
        reasons = [obstacle.reason for obstacle in obstacles([record], "sm89")]
        assert reasons == [] if lowering != "plugin" else "no plugin library is given" in reasons[0]
        assert (record.plugin_operators == ("dlo::SkipDown", "dlo::SkipGateUp")) == (lowering == "plugin")
        assert (record.capture_problem is None) == (lowering == "plugin")


@pytest.mark.parametrize(("kind", "lowering"), [("layer", "compact"), ("layer", "if"), ("attention", "compact")])
def test_engine_skips_attention_and_equals_pytorch_when_tokens_skip_it(kind, lowering, tmp_path):
    model = REFERENCE.parent / "reference_layer_routed"
    if kind == "attention":
        model = save_tiny_llama(tmp_path / "model", routed=[True, False, True], model_type="llama_dlo_attn")
    trt = TensorRtRequest(backend="rtx", targets=("sm89",), max_batch=3, max_sequence=56, max_cache=56)
    request = ExportRequest(str(model), tmp_path / "out", lowering=lowering, trt=trt)
    description = export_model(request, Reporter()).description
    (engine,) = description.engines
    assert (description.parity.verdict, engine.lowering, engine.dtype) == ("PASS", lowering, "bf16")
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert f"trt {lowering}" in {case["candidate"] for case in parity["cases"]}, "the engine's graph in fp32"
    mechanism = find_lowering(lowering, "tensorrt").tensorrt_layers
    assert {layer: set(found) for layer, found in engine.build.census.skipping.items()} == dict.fromkeys(
        description.routed_layers, mechanism
    )
    states = {spec.name: spec.shape for spec in engine.interface.inputs if "active" in spec.name}
    remembering = description.routed_layers if kind == "layer" else ()
    assert states == {f"past_active.{layer}": ("batch", 1, 56, 1) for layer in remembering}
    assert engine.static_cache.present_of.keys() >= states.keys(), "updated in place, as the cache is"


def test_build_engines_copies_from_cache_when_the_same_model_is_exported_again(source, tmp_path, monkeypatch):
    """The graph's bytes, and so the key, are the same each time."""
    monkeypatch.setenv("DLO_EXPORT_CACHE", str(tmp_path / "cache"))
    builds = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        plan = plan_tensorrt(source, TensorRtRequest(backend="rtx", **SIZES), "compact", "bf16")
        save_graphs(plan, tmp_path / name, Reporter())
        requests = [engine_request(plan, engine, tmp_path / name) for engine in plan.engines]
        builds += build_engines(requests, Reporter())
    assert [build.from_cache for build in builds] == [False, True]
    assert builds[0].sha256 == builds[1].sha256
