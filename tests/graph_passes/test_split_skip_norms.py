from __future__ import annotations

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.spec.invariants import PLAIN, check_stage
from tests.graph_passes.graphs import MLP, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import check_idempotence, check_pass

SKIP_NORM = (
    "n, m, v, h = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.1> (x, mixed, norm{bias})\n  "
    + MLP.partition("\n  ")[2]
)
BEFORE = {"SkipSimplifiedLayerNormalization": 1, "Add": 1, "RMSNormalization": 0}


def _fused(bias: str = "", **parts: str | int) -> str:
    text = tiny_decoder(SKIP_NORM.format(bias=bias), initializers=", float[2] offset = {0.5,-1}", **parts)
    return text.replace("\n  h = Add (x, mixed)", "")


@pytest.mark.parametrize(("bias", "adds"), [("", 2), (", offset", 3)])
def test_split_gives_the_addition_a_node_of_its_own_when_it_is_fused(bias: str, adds: int) -> None:
    after = {"SkipSimplifiedLayerNormalization": 0, "Add": adds, "RMSNormalization": 1}
    text = _fused(bias) if bias else _fused().replace(", float[2] offset = {0.5,-1}", "")
    model = check_pass(text, SplitSkipNormsPass(), BEFORE, after, tiny_feeds())
    (layer,) = find_decoder_layers(model.graph)
    assert layer.mlp.stream_in.name == "h"
    remove_unused(model.graph)  # the text has constants for routing
    check_stage(model, PLAIN)


def test_split_uses_the_contrib_norm_when_opset_has_none() -> None:
    model = ir.from_onnx_text(_fused(opset=22))
    assert SplitSkipNormsPass()(model).modified
    assert "SimplifiedLayerNormalization" in {node.op_type for node in model.graph}
    check_idempotence(model, SplitSkipNormsPass())


@pytest.mark.parametrize(
    "text",
    [tiny_decoder(), _fused().replace("com.microsoft.Skip", "com.other.Skip").replace("com.microsoft", "com.other")],
    ids=["no_fusion", "other_domain"],
)
def test_split_leaves_the_graph_alone_when_nothing_is_fused(text: str) -> None:
    check_idempotence(ir.from_onnx_text(text), SplitSkipNormsPass())
