"""`router_thresholds` in a checkpoint's config.json: what is read, refused, and carried along."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np
import pytest

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.depth.expansion import expanded_config, routed_config
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.router_thresholds import (
    logit_threshold,
    read_thresholds,
    threshold_problems,
    thresholds_json,
)

ROUTED = {
    "model_type": "llama_dlo_exattn_thresholds",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "is_dlo": [True, False, True, True],
    "rescale_hidden_states": False,
}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_dict({**ROUTED, **changes})


def test_thresholds_are_float32_numbers_by_layer_when_read() -> None:
    routing = config(router_thresholds={"3": 0.3, "0": 0.5, "2": 0.75}).routing
    assert routing is not None
    assert dict(routing.thresholds) == {2: 0.75, 3: float(np.float32(0.3))}
    assert list(routing.thresholds) == [2, 3]


def test_thresholds_are_one_half_when_left_out() -> None:
    for changes in ({}, {"router_thresholds": None}, {"router_thresholds": {}}, {"router_thresholds": {"0": 0.5}}):
        routing = config(**changes).routing
        assert routing is not None
        assert routing.thresholds == {}


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"1": 0.4}, "router_thresholds.1 names a layer that is not routed"),
        ({"4": 0.4}, "router_thresholds.4 names a layer that is not routed"),
        ({"03": 0.4}, "router_thresholds.03 names no layer"),
        ({"x": 0.4}, "router_thresholds.x names no layer"),
        ({"9" * 5000: 0.4}, "names no layer"),
        ({"0": 0}, "router_thresholds.0 is 0, expected a score above 0 and below 1"),
        ({"0": 1.0}, "router_thresholds.0 is 1.0, expected a score above 0 and below 1"),
        ({"0": 1e-60}, "router_thresholds.0 is 1e-60, expected a score above 0 and below 1"),
        ({"0": 1 - 1e-12}, "expected a score above 0 and below 1"),
        ({"0": float("nan")}, "router_thresholds.0 is nan, expected a score above 0 and below 1"),
        ({"0": True}, "router_thresholds.0 is True, expected a score above 0 and below 1"),
        ({"0": "0.4"}, "router_thresholds.0 is '0.4', expected a score above 0 and below 1"),
        ({"0": None}, "router_thresholds.0 is None, expected a score above 0 and below 1"),
        ([0.4, 0.5, 0.5, 0.5], "router_thresholds is .*, expected an object of layers and scores"),
        (0.4, "router_thresholds is 0.4, expected an object of layers and scores"),
    ],
)
def test_config_names_the_layer_when_a_threshold_is_wrong(entries: Any, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        config(router_thresholds=entries)
    assert "hint: " in str(caught.value)


def test_thresholds_are_refused_when_they_and_the_layers_are_damaged() -> None:
    with pytest.raises(CheckpointError, match="is_dlo is 'x'"):
        config(is_dlo="x", router_thresholds={"9" * 5000: 0.4})


def test_config_is_refused_when_readers_of_its_type_would_ignore_its_thresholds() -> None:
    with pytest.raises(CheckpointError, match="is set, but readers of a llama_dlo_exattn look for none"):
        config(model_type="llama_dlo_exattn", router_thresholds={"0": 0.4})
    with pytest.raises(CheckpointError, match="expected model_type 'llama_dlo_thresholds'"):
        config(model_type="llama_dlo", router_thresholds={"0": 0.4})
    with pytest.raises(CheckpointError, match="names a layer that is not routed"):
        config(model_type="llama", is_dlo=False, router_thresholds={"0": 0.4})


def test_model_type_says_whether_there_are_thresholds_when_routing_is_written() -> None:
    assert routed_config([True, False])["model_type"] == "llama_dlo_exattn"
    assert "router_thresholds" not in routed_config([True, False])
    written = routed_config([True, False], thresholds={0: 0.25})
    assert (written["model_type"], written["router_thresholds"]) == ("llama_dlo_exattn_thresholds", {"0": 0.25})
    values = config(router_thresholds={"2": 0.25}).model_values()
    assert LlamaConfig.from_dict(values).routing == config(router_thresholds={"2": 0.25}).routing


def test_thresholds_follow_their_layers_when_a_model_is_deepened() -> None:
    raw = config(router_thresholds={"0": 0.25, "3": 0.75}).raw
    plan = placements("tli", 4, every=2)
    assert plan.original_positions == (0, 1, 3, 4)
    for zero_routers in (False, True):
        changes = expanded_config(raw, plan, zero_routers=zero_routers)
        deepened = LlamaConfig.from_dict({**raw, **changes}).routing
        assert deepened is not None
        assert deepened.thresholds == {0: 0.25, 4: 0.75}
        assert deepened.layers == ((0, 1, 2, 3, 4, 5) if zero_routers else (0, 3, 4))


def test_thresholds_come_back_the_same_when_written_and_read() -> None:
    thresholds = read_thresholds({"7": 0.1, "11": 0.9})
    assert read_thresholds(thresholds_json(thresholds)) == thresholds
    assert threshold_problems(thresholds_json(thresholds), (7, 11)) == []


def exact_sigmoid(logit: np.float32) -> np.float32:
    """Rounded to float32 once, to the nearest, from 80 digits: halfway there are none."""
    with decimal.localcontext(prec=80):
        score = 1 / (1 + (-decimal.Decimal(float(logit))).exp())
        near = np.float32(float(score))
        around = (np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(1)))
        return min(around, key=lambda each: abs(decimal.Decimal(float(each)) - score))


def neighbours(value: float, count: int = 4) -> list[np.float32]:
    """The float32 numbers around one, rising, itself in the middle."""
    found = [np.float32(value)]
    for _ in range(count):
        found.insert(0, np.nextafter(found[0], np.float32(-np.inf)))
        found.append(np.nextafter(found[-1], np.float32(np.inf)))
    return found


def some_thresholds() -> list[float]:
    """One half and its neighbours, the ends of what a threshold may be, and numbers of every size."""
    rng = np.random.default_rng(0)
    ends = [float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).tiny), 1 - 2.0**-24]
    drawn = [*rng.random(60), *10.0 ** rng.uniform(-44, 0, 60), *(1 - 10.0 ** rng.uniform(-7, 0, 60))]
    near = [float(each) for each in (*neighbours(0.5), *neighbours(0.25), *neighbours(0.9))]
    return [*ends, *near, *(number for each in drawn if 0 < (number := float(np.float32(each))) < 1)]


def test_logit_exceeds_its_threshold_exactly_when_the_score_does() -> None:
    for threshold in some_thresholds():
        limit = logit_threshold(threshold)
        for logit in neighbours(limit):
            assert (logit > limit) == (exact_sigmoid(logit) > threshold), (threshold, logit)


def test_logit_of_one_half_is_not_zero() -> None:
    assert logit_threshold(0.5) == 2.0**-23


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, float("nan"), 0.1])
def test_logit_is_refused_when_the_threshold_is_no_score_in_float32(threshold: float) -> None:
    with pytest.raises(ValueError, match="no float32 above 0 and below 1"):
        logit_threshold(threshold)
