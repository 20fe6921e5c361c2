"""Proof that skipped tokens cost nothing: ONNX Runtime's own profile of the shapes its MatMul kernels saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.harness import make_session

MODEL = Path(__file__).parent.parent / "data" / "optimum_llama" / "model.onnx"
LAYERS, HIDDEN, INTERMEDIATE = 3, 32, 48
BATCH, SEQUENCE = 2, 6


def _lowered() -> tuple[ir.Model, dict[str, tuple[int, str]]]:
    """A graph that routes layers 0 and 2 by force, and for each linear node its layer and role."""
    model = ir.load(MODEL)
    RouteLayersPass({layer: np.zeros(HIDDEN) for layer in (0, 2)})(model)
    LowerSkipToCompactionPass()(model)
    ExposeRoutingPass(force=True)(model)
    nodes = {
        projection.storage.node.name: (layer.index, role)
        for layer in find_decoder_layers(model.graph)
        for role, projection in layer.projections.items()
        if role.endswith("_proj")
    }
    return model, nodes


def profiled_shapes(model: ir.Model, feeds: dict[str, np.ndarray], folder: Path) -> dict[str, list[list[int]]]:
    """Shape of the first input of every kernel that ran, by node name, in one run of the optimised graph."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = make_session(model, ort.GraphOptimizationLevel.ORT_ENABLE_ALL, options)
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    shapes: dict[str, list[list[int]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            first_input = event["args"]["input_type_shape"][0]
            # A product and the addition behind it may run as one.
            name = event["name"].removesuffix("_kernel_time").removesuffix("/MatMulAddFusion")
            shapes.setdefault(name, []).append(next(iter(first_input.values())))
    return shapes


def _feeds(active: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    cache = np.zeros((BATCH, 2, 0, 8), np.float32)
    return {
        "input_ids": rng.integers(0, 64, (BATCH, SEQUENCE)),
        "attention_mask": np.ones((BATCH, SEQUENCE), np.int64),
        "position_ids": np.tile(np.arange(SEQUENCE), (BATCH, 1)),
        **{f"past_key_values.{layer}.{part}": cache for layer in range(LAYERS) for part in ("key", "value")},
        **{f"force_active.{layer}": decision for layer, decision in active.items()},
    }


@pytest.mark.parametrize("count", [0, 5, BATCH * SEQUENCE], ids=["none", "some", "all"])
def test_mlp_matmuls_process_active_rows_only_when_active_tokens_are(count: int, tmp_path: Path) -> None:
    model, linear_nodes = _lowered()
    decision = np.zeros(BATCH * SEQUENCE, bool)
    decision[np.random.default_rng(1).permutation(decision.size)[:count]] = True
    decision = decision.reshape(BATCH, SEQUENCE)
    active = {0: decision, 2: ~decision}
    shapes = profiled_shapes(model, _feeds(active), tmp_path)

    assert len(linear_nodes) == LAYERS * 7
    for name, (layer, role) in linear_nodes.items():
        width = INTERMEDIATE if role == "down_proj" else HIDDEN
        skips = layer in active and role in ("gate_proj", "up_proj", "down_proj")
        rows = [int(active[layer].sum())] if skips else [BATCH, SEQUENCE]
        expected = [*rows, width]
        assert shapes[name] == [expected], f"{role} of layer {layer}"
