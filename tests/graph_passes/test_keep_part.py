"""A decoder cut into parts, which one after the other compute what it computes as a whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.interface import STREAM_IN, STREAM_OUT, parse_past
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import subgraphs_of
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.routing.keep_part import KeepPartPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.golden_graphs import ROUTERS, source_text
from tests.graph_passes.harness import Arrays, run_model
from tests.graph_passes.injections import injection_pass

LAYERS = 3


def deep_decoder(kind: str) -> ir.Model:
    """Three layers, the first and the last routed, lowered to conditionals: branches capture what is around them."""
    model = ir.from_onnx_text(source_text())
    injection_pass(model, [(1, 0), (2, 0)], "copy")(model)
    RouteLayersPass({0: ROUTERS[0], 2: -ROUTERS[0]}, kind=kind)(model)  # type: ignore[arg-type]
    LowerSkipToIfPass()(model)
    return model


def feeds_of(model: ir.Model) -> Arrays:
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 5, (2, 4)),
        "attention_mask": np.ones((2, 7), np.int64),
        "position_ids": np.tile(np.arange(3, 7), (2, 1)),
    }
    for value in model.graph.inputs:
        if (name := value.name or "").startswith("past_key_values"):
            feeds[name] = rng.standard_normal((2, 1, 3, 2)).astype(np.float32)
        elif name.startswith("past_active"):
            feeds[name] = rng.random((2, 3)) < 0.5
    return feeds


@pytest.mark.parametrize("kind", ["mlp", "layer", "attention"])
def test_parts_in_a_row_compute_what_the_whole_does(kind: str) -> None:
    whole = deep_decoder(kind)
    feeds = feeds_of(whole)
    expected, found, stream = run_model(whole, feeds), {}, None
    for part in range(LAYERS + 2):
        model = deep_decoder(kind)
        KeepPartPass(part)(model)
        inputs = {value.name for value in model.graph.inputs}
        layers = {cache.layer for name in inputs if (cache := parse_past(name)) is not None}
        assert layers == ({part - 1} if 1 <= part <= LAYERS else set()), "no other layer's cache"
        given = {name: array for name, array in feeds.items() if name in inputs}
        found |= run_model(model, given if stream is None else {**given, STREAM_IN: stream})
        stream = found.pop(STREAM_OUT, None)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_part_holds_no_weight_of_another_when_branches_captured_it() -> None:
    model = deep_decoder("mlp")
    KeepPartPass(2)(model)
    assert not [name for name in model.graph.initializers if "layers.0" in name or "layers.2" in name]
    assert not [node for node in model.graph if list(subgraphs_of(node))], "layer 1 is not routed"


@pytest.mark.parametrize("part", [-1, LAYERS + 2])
def test_part_is_refused_when_there_is_none_of_its_number(part: int) -> None:
    with pytest.raises(GraphPassError, match=f"there is no part {part}, expected 0 to 4"):
        KeepPartPass(part)(deep_decoder("mlp"))
