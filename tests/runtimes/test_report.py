from __future__ import annotations

import dataclasses

import pytest

from dlo_export.runtimes.parity.case_result import CaseResult, OwnRun
from dlo_export.runtimes.parity.greedy_result import GreedyDifference, GreedyResult
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.statistics import NO_SCORES, Flip, LogitStatistics, ScoreStatistics
from dlo_export.runtimes.parity.tolerances import TOLERANCES, OwnError, Tolerance
from dlo_export.runtimes.parity.verdict import Judgement

EXACT, FAR = LogitStatistics(100, 0.0, 0.0, 0.0, 0, 0), LogitStatistics(100, 1.0, 1.0, 1.0, 0, 0)
SURE, SURER = (OwnError(0.0, 0.0, score, 0.003) for score in (0.025, 0.015))


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
        # two logits may be off, and no more
        (GreedyDifference(0, 2, gap=2.0, error=1.0, flips=0), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=2.5, error=1.0, flips=0), "FAIL"),
        (GreedyDifference(0, 2, gap=2.0, error=1.0, flips=0, rounding=1.0), "PASS"),
        (GreedyDifference(0, 2, gap=2.5, error=2.0, flips=0, rounding=1.0), "AMBIGUOUS"),
    ],
)
def test_greedy_difference_is_judged_by_what_explains_it_when_tokens_differ(
    difference: GreedyDifference, verdict: str
) -> None:
    result = GreedyResult("onnx", ((1, 2, 3), (4, 5, 6)), (difference,))
    assert (result.identical, result.total) == (5, 6)
    assert result.judge().verdict == verdict


def test_greedy_tokens_are_judged_by_all_sequences_that_differ() -> None:
    rounding, open_, wrong = (
        GreedyDifference(row, 2, gap=gap, error=1e-6, flips=0, rounding=rounding)
        for row, gap, rounding in ((0, 1e-6, 1e-6), (1, 1.5e-6, 1e-7), (2, 1.0, 1e-6))
    )
    flipped = GreedyDifference(3, 2, gap=2.0, error=1e-6, flips=1)

    def judge(*differences: GreedyDifference) -> Judgement:
        return GreedyResult("onnx", ((1, 2, 3),) * 4, differences).judge()

    assert judge(rounding).verdict == "PASS"
    for several in ((rounding, open_), (open_, rounding)):
        judgement = judge(*several)
        assert (judgement.verdict, judgement.reason[:10]) == ("AMBIGUOUS", "sequence 1")
    for several in ((rounding, wrong, flipped), (flipped, wrong, rounding)):
        judgement = judge(*several)
        assert (judgement.verdict, judgement.reason[:10]) == ("FAIL", "sequence 2")
    assert GreedyResult("onnx", ((), ()), ()).judge() == ("FAIL", "nothing was compared")


def test_joined_report_fails_when_one_of_its_comparisons_does() -> None:
    right, wrong = CaseResult("prefill", "onnx", EXACT, None, 0, ()), CaseResult("prefill", "engine", FAR, None, 0, ())
    same = GreedyResult("onnx", ((1, 2),), ())
    other = GreedyResult("engine", ((1, 2),), (GreedyDifference(0, 1, gap=1.0, error=0.0, flips=0),))
    good = ParityReport("PyTorch", "fp32", TOLERANCES["fp32"], (right,), (same,))
    for changes in ({"cases": (wrong,)}, {"greedy": (other,)}):
        bad = dataclasses.replace(good, reference="the graph", **changes)
        for reports in ((good, bad), (bad, good)):
            joined = ParityReport.joined(reports)
            assert joined.reference == " and ".join(report.reference for report in reports)
            assert joined.cases == (*reports[0].cases, *reports[1].cases)
            assert joined.greedy == (*reports[0].greedy, *reports[1].greedy)
            assert joined.verdict == "FAIL"
    assert ParityReport.joined((good, good)).verdict == "PASS"


def test_report_counts_all_flips_and_lists_the_first() -> None:
    flips = tuple(Flip(0, 0, position, 0.5, 0.4) for position in range(60))
    result = CaseResult("prefill", "onnx", EXACT, EXACT, 60, flips, own_run=OwnRun(EXACT, flips))
    (case,) = ParityReport("PyTorch", "fp32", TOLERANCES["fp32"], (result,)).to_json()["cases"]
    assert (case["flip_count"], len(case["flips"]), len(case["own_run"]["flips"])) == (60, 50, 50)
    assert case["logits"] == dataclasses.asdict(EXACT)


def test_summary_tells_case_by_case_and_candidate_by_candidate() -> None:
    flips = tuple(Flip(layer, 0, 7, 0.5 + layer / 2**17, 0.4) for layer in range(5))
    report = ParityReport(
        "PyTorch",
        "fp32",
        TOLERANCES["fp32"],
        (
            CaseResult("prefill", "onnx", EXACT, None, 0, ()),
            CaseResult("prefill", "longer", EXACT, None, 9, flips[2:]),
            CaseResult("decode", "onnx", EXACT, None, 9, flips),
        ),
        (GreedyResult("longer", ((1, 2),), ()),),
    )
    assert report.summary().splitlines() == [
        "parity AMBIGUOUS  against PyTorch, fp32",
        "  PASS      onnx    prefill                         logits within 0.0e+00",
        "  AMBIGUOUS onnx    decode                          logits within 0.0e+00, 5 of 9 decisions flipped",
        "            5 near-ties flipped: layer 4 token 7 margin 3.1e-05, layer 3 token 7 margin 2.3e-05, "
        "layer 2 token 7 margin 1.5e-05, …",
        "  AMBIGUOUS longer  prefill                         logits within 0.0e+00, 3 of 9 decisions flipped",
        "            3 near-ties flipped: layer 4 token 7 margin 3.1e-05, layer 3 token 7 margin 2.3e-05, "
        "layer 2 token 7 margin 1.5e-05",
        "  PASS      longer  greedy tokens                   2 of 2 identical",
    ]


@pytest.mark.parametrize(
    ("difference", "own", "verdict", "words"),
    [
        (2e-5, None, "FAIL", "differ: mean 2.0e-05 and largest 2.0e-05 of the peak, worst at sequence 1, token 7"),
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
    logits = LogitStatistics(100, difference, difference, difference, 1, 7)
    judgement = CaseResult("prefill", "onnx", logits, None, 0, (), own_error=own).judge(TOLERANCES["fp32"])
    assert judgement.verdict == verdict
    assert words in judgement.reason


@pytest.mark.parametrize(
    ("layer_median", "largest", "own", "verdict", "words"),
    [
        (1e-5, 2e-2, None, "PASS", ""),
        (1.1e-5, 2e-2, None, "FAIL", "scores of routers differ: layer 3 by median 1.1e-05 and the largest by 2.0e-02"),
        (1e-5, 2.1e-2, None, "FAIL", "1e-05 and 2e-02 are allowed"),
        (float("nan"), float("nan"), None, "FAIL", "layer 3 by median nan"),
        (2e-5, 2.1e-2, OwnError(0.0, 0.0, 6e-3, 1e-6, 5e-6), "PASS", "as exact as the reference"),
        (2e-5, 2.1e-2, OwnError(0.0, 0.0, 6e-3, 1e-6, 4e-6), "FAIL", "scores of routers differ"),
        (2e-4, 2.1e-2, OwnError(0.0, 0.0, 6e-3, 1e-6, 1e-4), "AMBIGUOUS", "a wrong one might pass"),
    ],
)
def test_scores_are_judged_when_no_decision_flips(
    layer_median: float, largest: float, own: OwnError | None, verdict: str, words: str
) -> None:
    scores = ScoreStatistics(30, layer_median / 2, 3, layer_median, largest, ())
    result = CaseResult("prefill", "onnx", EXACT, EXACT, 30, (), own_error=own, scores=scores)
    judgement = result.judge(TOLERANCES["fp32"])
    assert judgement.verdict == verdict
    assert words in judgement.reason


def test_summary_says_which_routers_scores_are_off_and_which_are_not_shown() -> None:
    shown, hidden = ScoreStatistics(30, 0.0, 3, 0.0, 2e-6, ()), dataclasses.replace(NO_SCORES, not_shown=(1, 3))
    cases = [CaseResult("prefill", "onnx", EXACT, None, count, (), scores=s) for count, s in ((30, shown), (0, hidden))]
    report = ParityReport("PyTorch", "fp32", TOLERANCES["fp32"], tuple(cases))
    first, second = report.summary().splitlines()[1:]
    assert first.endswith("0 of 30 decisions flipped, scores within 2.0e-06")
    assert second.endswith("within 0.0e+00, scores of layers 1, 3 not shown: their routers were not compared")
    assert [case["scores"]["not_shown"] for case in report.to_json()["cases"]] == [[], [1, 3]]


def test_case_is_judged_by_the_table_alone_when_that_passes_it() -> None:
    result = CaseResult("prefill", "onnx", EXACT, None, 0, (), own_error=OwnError(1.0, 1.0, 1.0))
    assert result.judge(TOLERANCES["fp32"]) == ("PASS", "")


@pytest.mark.parametrize(("score", "verdict"), [(0.625, "AMBIGUOUS"), (0.63, "FAIL")])
@pytest.mark.parametrize("own_run", [False, True])
def test_flip_is_a_near_tie_up_to_the_margin(score: float, verdict: str, own_run: bool) -> None:
    flips = (Flip(0, 0, 3, score, 0.4),)
    result = CaseResult("prefill", "onnx", EXACT, EXACT, 10, flips)
    if own_run:
        result = dataclasses.replace(result, flips=(Flip(0, 0, 3, 0.5, 0.6),), own_run=OwnRun(EXACT, flips))
    table = Tolerance(mean=0.0, largest=0.0, score_layer=0.0, score=0.0, margin=0.125, own_errors=1, why="")
    assert result.judge(table).verdict == verdict


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
        # of both runs, the flip that was furthest from a tie counts
        (SURE, 0.0, OwnRun(EXACT, (Flip(1, 0, 3, 0.52, 0.4),)), "PASS", "margins are at most 4.0e-02"),
        (SURE, 0.0, OwnRun(EXACT, (Flip(1, 0, 3, 0.58, 0.4),)), "AMBIGUOUS", "margins are at most 8.0e-02"),
        (SURER, 0.0, OwnRun(EXACT, (Flip(1, 0, 3, 0.52, 0.4),)), "AMBIGUOUS", "margins are at most 4.0e-02"),
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
    scores = ScoreStatistics(10, score_error, 0, score_error, score_error, ())
    result = dataclasses.replace(result, scores=scores, own_run=own_run)
    judgement = result.judge(TOLERANCES["bf16"])
    assert judgement.verdict == verdict
    assert words in judgement.reason
