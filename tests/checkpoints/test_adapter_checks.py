"""What is wrong with an adapter is said of every field and tensor at once."""

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.checks import config_problems, injected_layer_problems, tensor_problems
from dlo_export.checkpoints.lazy_tensors import ArrayTensor

CONFIG = {
    "format_version": 1,
    "base_sha256": None,
    "routing": "mlp",
    "is_dlo": [True, False],
    "rescale_hidden_states": True,
    "scale_factor": 2.0,
    "scale_gap": 0.05,
    "injected_layers": [],
}


def test_right_configuration_has_no_problems():
    assert config_problems(CONFIG) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_dlo": []}, "is_dlo is []"),
        ({"is_dlo": [1, 0]}, "is_dlo is [1, 0]"),
        ({"scale_factor": True}, "scale_factor is True"),
        ({"scale_gap": float("nan")}, "scale_gap is nan"),
        ({"routing": "token"}, "routing is 'token'"),
        ({"base_sha256": "abc"}, "base_sha256 is 'abc'"),
        ({"surprise": 1}, "surprise is not a field"),
    ],
)
def test_field_is_named_when_it_is_wrong(change, words):
    assert any(problem.startswith(words) for problem in config_problems({**CONFIG, **change}))


def test_every_missing_field_is_named():
    assert len(config_problems({})) == len(CONFIG) - 1  # base_sha256 may be left out


def test_tensors_are_named_when_missing_unexpected_or_not_finite():
    tensors = {
        "model.routers.0.weight": ArrayTensor(np.array([[1.0, np.nan]], np.float32)),
        "model.routers.3.weight": ArrayTensor(np.ones((1, 2), np.float32)),
    }
    found = tensor_problems(tensors, routed_layers=[0, 1], injected_positions=[])
    assert found == [
        "model.routers.1.weight is missing",
        "model.routers.3.weight is unexpected: that layer is not routed",
        "model.routers.0.weight holds values that are not finite",
    ]


def test_shapes_are_measured_against_each_other():
    tensors = {f"model.routers.{i}.weight": ArrayTensor(np.ones((1, 2 + i), np.float32)) for i in range(2)}
    (problem,) = tensor_problems(tensors, routed_layers=[0, 1], injected_positions=[])
    assert problem == "model.routers.1.weight has hidden size 3, but model.routers.0.weight has 2"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"position": 9, "source": 0, "init": "copy"}], "position is 9"),
        ([{"position": True, "source": 0, "init": "copy"}], "position is True"),
        ([{"position": 1, "source": 3, "init": "copy"}], "source is 3"),
        ([{"position": 1, "source": 0, "init": "magic"}], "init"),
        ([7], "injected_layers[0] is 7"),
        ([{"position": p, "source": 0, "init": "copy"} for p in (2, 1)], "rising positions"),
    ],
)
def test_injected_layer_is_named_when_it_is_wrong(entries, words):
    assert words in injected_layer_problems(entries, 4, 3)[0]
