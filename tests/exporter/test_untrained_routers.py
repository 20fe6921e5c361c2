"""The warning of routers that are all zeros."""

from dlo_export.exporter.sources.untrained_routers import untrained_router_warning


def test_warning_names_layers_and_counts_the_rest():
    assert "layers 3, 7 are all zeros" in untrained_router_warning([3, 7], "mlp")
    assert "layers 0, 1, 2, 3, 4, 5, 6, 7 and 72 more are" in untrained_router_warning(range(80), "layer")
    assert "dlo calibrate" in untrained_router_warning([0], "mlp")
