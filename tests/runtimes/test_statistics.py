from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.parity.statistics import (
    first_diverging_layer,
    flips,
    logit_statistics,
    own_error,
    stream_errors,
)
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


def test_worst_token_is_the_one_that_is_furthest_off_for_its_peak() -> None:
    reference = np.array([[[1.0, -4], [0, 0.5]], [[8, 1], [1, 1]]], np.float32)
    candidate = reference + np.array([[[0.0, 1], [0.125, 0]], [[2, -3], [0.5, 0]]], np.float32)
    found = logit_statistics(reference, candidate, np.ones((2, 2), bool))
    assert (found.largest, found.row, found.position) == (0.5, 1, 1)
    assert found.largest_absolute == 3


def test_own_error_is_of_logits_and_scores_of_real_tokens() -> None:
    exact, scores = np.full((1, 3, 2), 2.0, np.float32), {1: np.array([[0.5, 0.25, 0.5]], np.float32)}
    logits = exact + np.array([[[1, 0], [0, 0], [9, 9]]], np.float32)
    found = own_error(
        exact, logits, scores, {1: np.array([[0.375, 0.25, 0.9]], np.float32)}, np.array([[True, True, False]]), "words"
    )
    assert (found.mean, found.largest) == (1 / 4 / 2, 1 / 2)
    assert (found.score, found.score_mean, found.compared) == (0.125, 0.0625, "words")
    unrouted = own_error(exact, logits, {}, {}, np.array([[True, True, False]]), "words")
    assert (unrouted.score, unrouted.score_mean) == (0, 0)


def test_nothing_agrees_when_nothing_was_compared_or_a_value_is_not_finite() -> None:
    logits = np.zeros((1, 2, 3), np.float32)
    nothing = logit_statistics(logits, logits, np.zeros((1, 2), bool))
    assert (nothing.compared, nothing.within(FP32)) == (0, False)
    broken = logits.copy()
    broken[0, 1, 2] = np.nan
    found = logit_statistics(logits, broken, np.ones((1, 2), bool))
    assert not found.within(FP32)
    assert (found.compared, found.position) == (6, 1)
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


def test_flips_are_told_by_the_layer_s_own_threshold() -> None:
    wanted = {0: np.array([[0.75, 0.75]], np.float32), 2: np.array([[0.75, 0.25]], np.float32)}
    found = {0: np.array([[0.75, 0.25]], np.float32), 2: np.array([[0.5, 0.75]], np.float32)}
    listed = list(flips(wanted, found, np.ones((1, 2), bool), {2: 0.625}))
    assert [(flip.layer, flip.position, flip.threshold, flip.margin) for flip in listed] == [
        (0, 1, 0.5, 0.25),
        (2, 0, 0.625, 0.125),
        (2, 1, 0.625, 0.375),
    ]


def test_first_diverging_layer_is_named_when_streams_drift_apart() -> None:
    wanted = [{layer: np.ones((1, 2, 4), np.float32) for layer in range(3)}]
    found = [{0: wanted[0][0], 1: wanted[0][1] * 1.5, 2: wanted[0][2] * np.nan}]
    errors = stream_errors(wanted, found, [np.array([[True, False]])])
    assert errors[0] == 0
    assert errors[1] == pytest.approx(0.5)
    assert first_diverging_layer(errors, FP32) == 1
    assert first_diverging_layer({0: 0.0, 2: errors[2]}, FP32) == 2
    assert first_diverging_layer({0: 0.0}, FP32) is None
    assert stream_errors(wanted, [{1: found[0][1]}], [np.array([[True, False]])]) == {1: errors[1]}
