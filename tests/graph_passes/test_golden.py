from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph_passes import golden_graphs
from tests.graph_passes.harness import check_idempotence, run_model


@pytest.mark.parametrize("name", golden_graphs.GOLDENS)
def test_pass_makes_golden_graph_when_run_on_one_layer_llama(name: str) -> None:
    model = golden_graphs.golden_graph(name)
    golden = golden_graphs.FOLDER / f"{name}.txt"
    assert golden_graphs.golden_text(model) == golden.read_text(encoding="utf-8"), (
        "the pass makes another graph; read the difference, then: python -m tests.graph_passes.golden_graphs"
    )


@pytest.mark.parametrize("name", ["inject_layers", "fuse_sibling_matmuls", "expose_routing"])
def test_golden_graph_computes_what_the_plain_one_does_when_it_changes_no_decision(name: str) -> None:
    plain = ir.from_onnx_text(golden_graphs.source_text())
    if name == "expose_routing":
        # All tokens forced active; the scale still applies, so the reference is the masked form, forced alike.
        plain = ir.from_onnx_text(golden_graphs.source_text())
        golden_graphs.GOLDENS["route_layers"][0](plain)
        golden_graphs.GOLDENS["expose_routing"][-1](plain)
    model = golden_graphs.golden_graph(name)
    feeds = golden_graphs.golden_feeds([value.name for value in model.graph.inputs])
    expected = run_model(plain, {value.name: feeds[value.name] for value in plain.graph.inputs})
    outputs = run_model(model, feeds)
    for output, array in expected.items():
        np.testing.assert_allclose(outputs[output], array, rtol=0, atol=1e-6, err_msg=output)


@pytest.mark.parametrize(
    "name", ["lower_skip_to_compaction", "lower_skip_to_if", "lower_skip_to_topk", "reduce_router_products"]
)
def test_lowered_llama_equals_the_masked_one_when_some_tokens_are_active(name: str) -> None:
    masked, lowered = golden_graphs.golden_graph("route_layers"), golden_graphs.golden_graph(name)
    feeds = golden_graphs.golden_feeds([value.name for value in masked.graph.inputs], sequence=6)
    expected, outputs = run_model(masked, feeds), run_model(lowered, feeds)
    for output, array in expected.items():
        np.testing.assert_allclose(outputs[output], array, rtol=0, atol=1e-6, err_msg=output)


@pytest.mark.parametrize("name", golden_graphs.GOLDENS)
def test_pass_changes_nothing_when_run_twice_on_one_layer_llama(name: str) -> None:
    check_idempotence(golden_graphs.golden_graph(name), golden_graphs.GOLDENS[name][-1])
