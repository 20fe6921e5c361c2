from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.parity.statistics import first_diverging_layer, flips, logit_statistics, stream_errors
from dlo_export.runtimes.parity.tolerances import TOLERANCES

FP32 = TOLERANCES["fp32"]


def test_differences_are_relative_to_the_peak_when_padding_is_left_out() -> None:
    reference = np.array([[[1.0, -4], [0, 0.5], [2, 1]]], np.float32)
    candidate = reference + np.array([[[0.0, 1], [0.25, 0], [9, 9]]], np.float32)
    found = logit_statistics(reference, candidate, np.array([[True, True, False]]))
    assert found.compared == 4
    assert found.mean == pytest.approx((1 + 0.25) / 4 / ((4 + 1) / 2))  # a peak below 1 counts as 1
    assert (found.largest, found.largest_absolute) == (0.25, 1.0)
    assert (found.row, found.position) == (0, 0)


def test_nothing_agrees_when_nothing_was_compared_or_a_value_is_not_finite() -> None:
    logits = np.zeros((1, 2, 3), np.float32)
    nothing = logit_statistics(logits, logits, np.zeros((1, 2), bool))
    assert (nothing.compared, nothing.within(FP32)) == (0, False)
    broken = logits.copy()
    broken[0, 1, 2] = np.nan
    found = logit_statistics(logits, broken, np.ones((1, 2), bool))
    assert not found.within(FP32)
    assert found.position == 1
    assert logit_statistics(logits, logits, np.ones((1, 2), bool)).within(FP32)
    with pytest.raises(RuntimeInputError, match=r"\[1, 2, 2\], the reference's \[1, 2, 3\][\s\S]*hint:"):
        logit_statistics(logits, logits[..., :2], np.ones((1, 2), bool))


@pytest.mark.parametrize("field", ["mean", "largest"])
def test_logits_are_within_a_tolerance_when_both_numbers_are(field: str) -> None:
    logits = np.ones((1, 1, 2), np.float32)
    exact = logit_statistics(logits, logits, np.ones((1, 1), bool))
    assert dataclasses.replace(exact, **{field: getattr(FP32, field)}).within(FP32)
    assert not dataclasses.replace(exact, **{field: getattr(FP32, field) * 1.01}).within(FP32)


def test_flips_tell_layer_row_position_and_margin_when_decisions_differ() -> None:
    wanted = {2: np.array([[0.5, 0.51], [0.9, 0.2]], np.float32)}
    found = {2: np.array([[0.6, 0.51], [np.nan, 0.8]], np.float32)}
    listed = list(flips(wanted, found, np.array([[True, True], [True, False]])))
    assert [(flip.layer, flip.row, flip.position) for flip in listed] == [(2, 0, 0), (2, 1, 0)]
    assert [flip.margin for flip in listed] == pytest.approx([0.0, 0.4])


def test_first_diverging_layer_is_named_when_streams_drift_apart() -> None:
    wanted = [{layer: np.ones((1, 2, 4), np.float32) for layer in range(3)}]
    found = [{0: wanted[0][0], 1: wanted[0][1] * 1.5, 2: wanted[0][2] * np.nan}]
    errors = stream_errors(wanted, found, [np.array([[True, False]])])
    assert errors[0] == 0
    assert errors[1] == pytest.approx(0.5)
    assert first_diverging_layer(errors, FP32) == 1
    assert first_diverging_layer({0: 0.0, 2: errors[2]}, FP32) == 2
    assert first_diverging_layer({0: 0.0}, FP32) is None
