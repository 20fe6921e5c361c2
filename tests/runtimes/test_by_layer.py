"""What a layer's numbers mean for its verdict, and the verdicts of layers for the report's."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dlo_export.runtimes.parity.by_layer import LayerReport, PartResult
from dlo_export.runtimes.parity.statistics import Flip
from dlo_export.runtimes.parity.tolerances import TOLERANCES, Tolerance

TOLERANCE = Tolerance(mean=0.25, largest=0.0, margin=0.125, own_errors=1, why="")
RIGHT = PartResult("layer 0", error=0.5, largest=9.0, alone=0.5, decisions=4, flips=())
TIE, SURE = Flip(0, 0, 3, 0.625, 0.4), Flip(0, 0, 3, 0.65, 0.4)


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "PASS", ""),  # streams may be off by twice what logits may
        ({"alone": 0.51}, "FAIL", "off by 5.1e-01 when fed the reference's stream, 5e-01 is allowed"),
        ({"error": 0.51}, "FAIL", "off by 5.1e-01, 5e-01 is allowed"),
        ({"alone": math.nan}, "FAIL", "when fed the reference's stream"),
        ({"error": math.nan}, "FAIL", "off by nan"),
        ({"flips": (TIE, TIE)}, "AMBIGUOUS", "2 near-ties flipped"),
        ({"flips": (TIE, SURE)}, "FAIL", "1 decisions flipped that are no near-ties"),
    ],
)
def test_part_is_judged_by_its_streams_then_by_its_decisions(
    changes: dict[str, object], verdict: str, words: str
) -> None:
    judgement = dataclasses.replace(RIGHT, **changes).judge(TOLERANCE)  # type: ignore[arg-type]
    assert judgement.verdict == verdict
    assert words in judgement.reason


def test_report_s_verdict_is_the_worst_of_its_parts() -> None:
    tie = dataclasses.replace(RIGHT, name="layer 1", flips=(TIE,))
    wrong = dataclasses.replace(RIGHT, name="layer 2", error=math.inf)
    for parts, verdict, failing in (
        ((RIGHT, RIGHT), "PASS", None),
        ((tie, RIGHT), "AMBIGUOUS", None),
        ((RIGHT, tie, wrong), "FAIL", "layer 2"),
        ((wrong, tie), "FAIL", "layer 2"),
        ((), "FAIL", None),
    ):
        report = LayerReport("PyTorch", "compact", "fp32", TOLERANCE, parts)
        assert (report.verdict, bool(report), report.first_failing) == (verdict, verdict == "PASS", failing)
    not_run = LayerReport("", "", "bf16", None, reason="no")
    assert (not_run.verdict, bool(not_run), not_run.first_failing) == ("NOT RUN", False, None)


def test_json_has_a_row_per_part_and_no_number_that_is_none() -> None:
    wrong = dataclasses.replace(RIGHT, name="head", error=math.nan, flips=(TIE,))
    document = LayerReport("PyTorch", "compact", "fp32", TOLERANCES["fp32"], (RIGHT, wrong)).to_json()
    assert (document["verdict"], document["first_failing"]) == ("FAIL", "layer 0")
    right, none = document["parts"]
    assert (right["name"], right["error"], right["decisions"], right["flips"]) == ("layer 0", 0.5, 4, [])
    assert (none["error"], none["alone"], none["flips"]) == (None, 0.5, [dataclasses.asdict(TIE)])
