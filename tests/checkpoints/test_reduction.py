"""What config.json says of a model without some of its layers."""

from __future__ import annotations

from dlo_export.checkpoints.depth.reduction import reduced_config


def test_everything_that_is_told_by_layer_follows_its_layer_when_others_go() -> None:
    config = {
        "num_hidden_layers": 5,
        "layer_types": ["a", "b", "c", "d", "e"],
        "is_dlo": [True, False, True, True, False],
        "injected_layers": [{"position": 1, "source": 0}, {"position": 3, "source": 2}],
        "router_thresholds": {"0": 0.25, "2": 0.75, "3": 0.375},
        "hidden_size": 8,
    }
    assert reduced_config(config, [0, 3, 4]) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "d", "e"],
        "is_dlo": [True, True, False],
        "injected_layers": [{"position": 1, "source": 2}],
        "router_thresholds": {"0": 0.25, "1": 0.375},
    }


def test_nothing_is_told_by_layer_when_config_says_nothing_of_it() -> None:
    assert reduced_config({"num_hidden_layers": 3, "is_dlo": True, "layer_types": None}, [2]) == {
        "num_hidden_layers": 1
    }
