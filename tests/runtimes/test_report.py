from __future__ import annotations

import dataclasses

import pytest

from dlo_export.runtimes.parity.report import CaseResult, GreedyDifference, GreedyResult, OwnRun, ParityReport
from dlo_export.runtimes.parity.statistics import Flip, LogitStatistics
from dlo_export.runtimes.parity.tolerances import TOLERANCES, OwnError

EXACT, FAR = LogitStatistics(100, 0.0, 0.0, 0.0, 0, 0), LogitStatistics(100, 1.0, 1.0, 1.0, 0, 0)


def test_report_says_why_when_parity_was_not_run() -> None:
    report = ParityReport.not_run("there is no PyTorch model")
    assert (report.verdict, bool(report)) == ("NOT RUN", False)
    assert report.to_json() == {"verdict": "NOT RUN", "reason": "there is no PyTorch model"}
    assert "there is no PyTorch model" in report.summary()


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (GreedyDifference(0, 2, gap=1e-6, error=1e-6, flips=0), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=1.0, error=1e-6, flips=1), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=1.0, error=1e-6, flips=0), "FAIL"),
        (GreedyDifference(0, 2, gap=1e-6, error=1e-6, flips=0, rounding=1e-6), "PASS"),
        (GreedyDifference(0, 2, gap=1e-6, error=1e-6, flips=0, rounding=1e-7), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=1e-6, error=1e-6, flips=1, rounding=1e-6), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=1.0, error=1e-6, flips=0, rounding=1.0), "FAIL"),
    ],
)
def test_greedy_difference_is_judged_by_what_explains_it_when_tokens_differ(
    difference: GreedyDifference, verdict: str
) -> None:
    result = GreedyResult("onnx", ((1, 2, 3), (4, 5, 6)), (difference,))
    assert (result.identical, result.total) == (5, 6)
    assert result.judge().verdict == verdict


@pytest.mark.parametrize(
    ("difference", "own", "verdict", "words"),
    [
        (2e-5, None, "FAIL", "logits differ"),
        (2e-5, OwnError(1e-7, 1e-7, 0.0), "FAIL", "logits differ"),
        (2e-5, OwnError(1e-5, 1e-4, 0.0), "PASS", "as exact as the reference"),
        (9e-5, OwnError(2e-5, 1e-4, 0.0), "FAIL", "logits differ"),
        (2e-4, OwnError(1e-4, 1e-3, 0.0), "AMBIGUOUS", "a wrong one might pass"),
        (2e-4, OwnError(float("nan"), float("nan"), float("nan")), "FAIL", "logits differ"),
        (float("nan"), OwnError(1e-1, 1e-1, 1e-1), "FAIL", "logits differ"),
    ],
)
def test_case_is_judged_by_the_reference_s_own_error_when_the_table_fails_it(
    difference: float, own: OwnError | None, verdict: str, words: str
) -> None:
    logits = LogitStatistics(100, difference, difference, difference, 0, 0)
    judgement = CaseResult("prefill", "onnx", logits, None, 0, (), own_error=own).judge(TOLERANCES["fp32"])
    assert judgement.verdict == verdict
    assert words in judgement.reason


def test_flip_is_a_near_tie_when_the_reference_s_own_score_is_as_uncertain() -> None:
    flip = Flip(0, 0, 3, 0.5 + 3e-4, 0.49)
    result = CaseResult("prefill", "onnx", EXACT, None, 10, (flip,), own_error=OwnError(0.0, 0.0, 1e-4))
    assert result.judge(TOLERANCES["fp32"]).verdict == "PASS"
    sure = dataclasses.replace(result, own_error=OwnError(0.0, 0.0, 5e-5))
    assert sure.judge(TOLERANCES["fp32"]).verdict == "FAIL"


@pytest.mark.parametrize(
    ("own", "score_error", "own_run", "verdict", "words"),
    [
        (OwnError(0.0, 0.0, 0.03, 0.003), 0.005, OwnRun(EXACT, ()), "PASS", "1 near-ties flipped"),
        (None, 0.0, OwnRun(EXACT, ()), "AMBIGUOUS", "1 near-ties flipped"),
        (OwnError(0.0, 0.0, 0.03, 0.003), 0.005, None, "AMBIGUOUS", "1 near-ties flipped"),
        # a router that is off everywhere, and one that is off here, by more than its type rounds
        (OwnError(0.0, 0.0, 0.03, 0.003), 0.02, OwnRun(EXACT, ()), "AMBIGUOUS", "scores are off by mean 2.0e-02"),
        (OwnError(0.0, 0.0, 0.01, 0.003), 0.005, OwnRun(EXACT, ()), "AMBIGUOUS", "margins are at most 4.0e-02"),
        # a released graph that does something else with its decisions, or takes others
        (OwnError(0.0, 0.0, 0.03, 0.003), 0.0, OwnRun(FAR, ()), "FAIL", "that its own routers took"),
        (
            OwnError(0.0, 0.0, 0.03, 0.003),
            0.0,
            OwnRun(EXACT, (Flip(1, 0, 3, 0.9, 0.4),)),
            "FAIL",
            "1 decisions of its own are no near-ties",
        ),
    ],
)
def test_flip_passes_when_all_that_it_led_to_is_right_and_scores_are_off_by_rounding(
    own: OwnError | None, score_error: float, own_run: OwnRun | None, verdict: str, words: str
) -> None:
    flip = Flip(0, 0, 3, 0.54, 0.49)
    result = CaseResult("prefill", "onnx", EXACT, FAR, 10, (flip,), own_error=own)
    result = dataclasses.replace(result, score_error=score_error, own_run=own_run)
    judgement = result.judge(TOLERANCES["bf16"])
    assert judgement.verdict == verdict
    assert words in judgement.reason
