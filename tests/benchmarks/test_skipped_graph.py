"""What skipping is measured against computes what a graph does that skips everything."""

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.common.given_decisions import decisions_given
from benchmarks.common.one_router import ask_first_router
from benchmarks.common.onnxruntime_worker import DecoderStep
from benchmarks.common.skipped_graph import everything_skipped
from dlo_export.checkpoints.interface import LOGITS
from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.tiny_models import save_tiny_llama

KINDS = ["llama_dlo_exattn", "llama_dlo", "llama_dlo_attn"]


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_graph_gives_what_the_routed_one_does_when_no_router_lets_a_token_through(tmp_path, kind):
    never = {layer: np.float32(0.9999).item() for layer in range(3)}
    model = save_tiny_llama(tmp_path / "model", routed=[True] * 3, model_type=kind, thresholds=never)
    export_model(ExportRequest(str(model), tmp_path / "out", lowering="if", parity=False), Reporter())
    routed = tmp_path / "out" / "model.onnx"
    skipped = everything_skipped(routed, "skipped")
    one_router, model = routed.with_name("one_router.onnx"), ir.load(routed)
    ask_first_router(model)
    ir.save(model, one_router)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 9))
    outputs = []
    for graph in (routed, skipped, one_router):
        step = DecoderStep(graph, tokens, 2, threads=1)
        step()
        outputs.append(step.outputs())
    assert LOGITS in outputs[1]
    for name, value in outputs[1].items():  # the cache too
        np.testing.assert_array_equal(value, outputs[0][name], err_msg=name)
        np.testing.assert_array_equal(value, outputs[2][name], err_msg=name)
    asked = {node.inputs[0].name for node in ir.load(one_router).graph if node.op_type == "If"}
    assert asked == {f"{ROUTERS}.0.any_active"}
    left = ir.load(skipped).graph
    assert not [name for name in left.initializers if name.startswith(f"{ROUTERS}.0.")]
    assert not [node for node in left if node.op_type == "If"]


@pytest.mark.parametrize("kind", KINDS)
def test_given_decisions_are_obeyed_when_routers_decided_so(tmp_path, kind):
    active = [True, False, True]
    thresholds = {layer: np.float32(0.0001 if runs else 0.9999).item() for layer, runs in enumerate(active)}
    model = save_tiny_llama(
        tmp_path / "model", routed=[True] * 3, model_type=kind, thresholds=thresholds, rescale=False
    )
    export_model(ExportRequest(str(model), tmp_path / "out", lowering="if", parity=False), Reporter())
    routed = tmp_path / "out" / "model.onnx"
    given = decisions_given(routed, active, "given")
    outputs = []
    for graph in (routed, given):
        step = DecoderStep(graph, np.random.default_rng(0).integers(0, 97, (2, 9)), 2, threads=1)
        step()
        outputs.append(step.outputs())
    assert outputs[0].keys() == outputs[1].keys()
    for name, value in outputs[0].items():
        np.testing.assert_array_equal(outputs[1][name], value, err_msg=name)
    left = ir.load(given).graph
    assert not [name for name in left.initializers if name.startswith(f"{ROUTERS}.1.")]
    assert len([node for node in left if node.op_type == "If"]) == 3
