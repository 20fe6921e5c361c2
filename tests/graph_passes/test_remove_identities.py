"""Nobody looks through Identity nodes that are not there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.cleanup.remove_identities import RemoveIdentitiesPass
from tests.graph_passes.harness import check_idempotence, check_pass

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
agraph (float[N] x, bool c) => (float[N] y, float[N] z)
<float[1] w = {2}> {
  one = Identity (x)
  two = Identity (one)
  weight = Identity (w)
  scaled = Mul (two, weight)
  y = If (c) <
    then_branch = yes () => (float[N] same) { same = Identity (two) },
    else_branch = no () => (float[N] other) { other = Neg (scaled) }
  >
  z = Identity (scaled)
}"""


def test_identities_are_gone_but_those_that_are_outputs() -> None:
    feeds = {"x": np.arange(3, dtype=np.float32), "c": np.array(True)}
    model = check_pass(TEXT, RemoveIdentitiesPass(), {"Identity": 5}, {"Identity": 2}, feeds)
    assert [node.op_type for node in model.graph] == ["Mul", "If", "Identity"]
    assert [value.name for value in model.graph[0].inputs] == ["x", "w"]


def test_graph_is_left_alone_when_it_has_none() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> agraph (float[N] x) => (float[N] y) { y = Neg (x) }'
    check_idempotence(ir.from_onnx_text(text), RemoveIdentitiesPass())
