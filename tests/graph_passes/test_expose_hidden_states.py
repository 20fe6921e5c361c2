from __future__ import annotations

from dlo_export.graph_passes.routing.expose_hidden_states import ExposeHiddenStatesPass
from tests.graph_passes.graphs import tiny_decoder, tiny_feeds
from tests.graph_passes.harness import check_pass


def test_hidden_state_of_every_layer_is_an_output_when_exposed() -> None:
    before, after = {"Identity": 1}, {"Identity": 2}
    model = check_pass(tiny_decoder(), ExposeHiddenStatesPass(), before, after, tiny_feeds(), new_outputs=["hidden.0"])
    assert [str(dim) for dim in model.graph.outputs[-1].shape] == ["B", "S", "2"]
