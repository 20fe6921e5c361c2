from __future__ import annotations

import pytest

from dlo_export.runtimes.parity.report import GreedyDifference, GreedyResult, ParityError, ParityReport


def test_report_says_why_when_parity_was_not_run() -> None:
    report = ParityReport.not_run("there is no PyTorch model")
    assert (report.verdict, bool(report)) == ("NOT RUN", False)
    assert report.to_json() == {"verdict": "NOT RUN", "reason": "there is no PyTorch model"}
    with pytest.raises(ParityError, match="there is no PyTorch model"):
        report.raise_if_failed()


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (GreedyDifference(0, 2, gap=1e-6, error=1e-6, flips=0), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=1.0, error=1e-6, flips=1), "AMBIGUOUS"),
        (GreedyDifference(0, 2, gap=1.0, error=1e-6, flips=0), "FAIL"),
    ],
)
def test_greedy_difference_is_ambiguous_when_rounding_or_a_flip_explains_it(
    difference: GreedyDifference, verdict: str
) -> None:
    result = GreedyResult("onnx", ((1, 2, 3), (4, 5, 6)), (difference,))
    assert (result.identical, result.total) == (5, 6)
    assert result.judge().verdict == verdict
