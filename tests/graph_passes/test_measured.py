"""The table of measured lowerings, and what is read from it."""

from __future__ import annotations

import pytest

from dlo_export.graph_passes.lowerings.measured import MeasuredModel, nearest_model, read_measured
from dlo_export.graph_passes.lowerings.registry import find_lowering

MODEL = MeasuredModel(
    target="onnxruntime-cpu",
    machine="a machine",
    onnxruntime="1",
    date="2026-01-01",
    dtype="fp32",
    routing="mlp",
    hidden_size=64,
    cells=("decode 1, layers, 0.0", "prefill 32, layers, 1.0"),
    milliseconds={"compact": (1.1, 2.0), "if": (1.0, 3.0), "plugin": (0.5, 2.5)},
)


def test_ratios_are_those_of_the_worst_cell_when_lowerings_are_compared() -> None:
    assert MODEL.worst_ratios(["compact", "if"]) == pytest.approx({"compact": 1.1, "if": 1.5})
    # Against another fastest one they are others.
    assert MODEL.worst_ratios(["compact", "if", "plugin"]) == pytest.approx({"plugin": 1.25, "if": 2.0, "compact": 2.2})
    assert list(MODEL.worst_ratios(["compact", "if", "plugin"])) == ["plugin", "if", "compact"]
    assert MODEL.worst_ratios(["unknown"]) == {}


def test_nearest_model_is_of_the_same_kind_and_of_the_nearest_size() -> None:
    sizes = {64: 576, 576: 576, 1024: 576, 1536: 2048, 8192: 2048, None: 576}
    for routing in ("mlp", "layer", "attention"):
        found = {size: nearest_model("onnxruntime-cpu", "fp32", routing, size) for size in sizes}
        assert {size: model and model.hidden_size for size, model in found.items()} == sizes
        assert all(model is not None and model.routing == routing for model in found.values())
    assert nearest_model("onnxruntime-cpu", "fp32", "attention-active", 576) is None
    assert nearest_model("tensorrt", "fp32", "mlp", 576) is None


def test_table_names_lowerings_that_there_are() -> None:
    models = read_measured()
    assert models
    for model in models:
        for name in model.milliseconds:
            assert model.routing in find_lowering(name, model.target).routing
