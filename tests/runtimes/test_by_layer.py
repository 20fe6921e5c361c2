"""What a layer's numbers mean for its verdict, and the verdicts of layers for the report's."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest

from dlo_export.runtimes.parity.by_layer import OpenPart, PartOutput, compare_by_layer
from dlo_export.runtimes.parity.cases import Case, Feed, step_feeds
from dlo_export.runtimes.parity.layer_report import LayerReport, PartResult
from dlo_export.runtimes.parity.statistics import Flip, ScoreStatistics
from dlo_export.runtimes.parity.tolerances import TOLERANCES, Tolerance
from dlo_export.runtimes.runner import BoolArray, FloatArray

TOLERANCE = Tolerance(mean=0.25, largest=1.0, score_layer=0.5, score=1.0, margin=0.125, own_errors=1, why="")
RIGHT = PartResult("layer 0", error=0.5, largest=9.0, alone=0.5, worst_alone=2.0, decisions=4, flips=())
SCORES = ScoreStatistics(4, 0.5, 0, 0.5, 1.0, ())
TIE, SURE = Flip(0, 0, 3, 0.625, 0.4), Flip(0, 0, 3, 0.65, 0.4)


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "PASS", ""),  # streams may be off by twice what logits may
        ({"alone": 0.51}, "FAIL", "off by 5.1e-01 when fed the reference's stream, 5e-01 is allowed"),
        ({"worst_alone": 2.1}, "FAIL", "a token is off by 2.1e+00 when fed the reference's stream, 2e+00 is allowed"),
        ({"error": 0.51}, "FAIL", "off by 5.1e-01, 5e-01 is allowed"),
        ({"alone": math.nan}, "FAIL", "when fed the reference's stream"),
        ({"worst_alone": math.nan}, "FAIL", "a token is off by nan"),
        ({"error": math.nan}, "FAIL", "off by nan"),
        ({"flips": (TIE, TIE)}, "AMBIGUOUS", "2 near-ties flipped"),
        ({"flips": (TIE, SURE)}, "FAIL", "1 decisions flipped that are no near-ties"),
        ({"scores": SCORES}, "PASS", ""),
        ({"scores": dataclasses.replace(SCORES, layer_median=0.51)}, "FAIL", "layer 0 by median 5.1e-01"),
        ({"scores": dataclasses.replace(SCORES, largest=1.1)}, "FAIL", "the largest by 1.1e+00, 5e-01 and 1e+00 are"),
        ({"scores": dataclasses.replace(SCORES, layer_median=math.nan)}, "FAIL", "scores of its router differ"),
    ],
)
def test_part_is_judged_by_its_streams_then_by_its_decisions(
    changes: dict[str, object], verdict: str, words: str
) -> None:
    judgement = dataclasses.replace(RIGHT, **changes).judge(TOLERANCE)  # type: ignore[arg-type]
    assert judgement.verdict == verdict
    assert words in judgement.reason


class OneHot:
    """A part that gives each token a direction of its own, and one token the opposite one."""

    def __init__(self, wrong: int | None) -> None:
        self.wrong = wrong

    def reset(self, batch: int) -> None:
        del batch

    def step(self, stream: FloatArray | None, feed: Feed, active: BoolArray | None) -> PartOutput:
        del active
        values = np.eye(97, dtype=np.float32)[feed.input_ids] if stream is None else stream
        return PartOutput(np.where(feed.input_ids[..., None] == self.wrong, -values, values), None)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_one_wrong_token_of_hundreds_fails_though_their_mean_passes(dtype: str) -> None:
    tokens = np.arange(97)
    cases = [Case("the last token", step_feeds([tokens], 1)), *[Case("without it", step_feeds([tokens[:-1]]))] * 7]

    def report(wrong: int | None) -> LayerReport:
        reference, candidate = (
            lambda part, token=token: contextlib.nullcontext(OneHot(token if part == 1 else None))
            for token in (None, wrong)
        )
        return compare_by_layer(
            reference, candidate, cases, num_layers=1, thresholds={}, dtype=dtype, names=("right", "wrong")
        )

    assert report(None).verdict == "PASS"
    wrong = report(96)
    assert (wrong.verdict, wrong.first_failing) == ("FAIL", "layer 0")
    assert wrong.parts[1].worst_alone == 2


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


class Scored(OneHot):
    """A part that lets everything pass, and shows a score per token: all, or halved about the threshold."""

    def __init__(self, *, halved: bool) -> None:
        super().__init__(None)
        self.halved = halved

    def step(self, stream: FloatArray | None, feed: Feed, active: BoolArray | None) -> PartOutput:
        scores = (feed.input_ids / 97).astype(np.float32)
        return super().step(stream, feed, active)._replace(scores=(scores + 0.5) / 2 if self.halved else scores)


@pytest.mark.parametrize("halved", [False, True])
def test_layer_fails_when_its_scores_are_others_though_every_decision_is_the_same(halved: bool) -> None:
    def parts(*, halved: bool) -> OpenPart:
        return lambda part: contextlib.nullcontext(Scored(halved=halved) if part == 1 else OneHot(None))

    report = compare_by_layer(
        parts(halved=False),
        parts(halved=halved),
        [Case("prefill", step_feeds([np.arange(97)], 1))],
        num_layers=1,
        thresholds={0: 0.5},
        dtype="fp32",
        names=("right", "candidate"),
    )
    assert (report.verdict, report.first_failing) == (("FAIL", "layer 0") if halved else ("PASS", None))
    assert not any(part.flips for part in report.parts)
    assert ("scores of its router differ: layer 0 by median 1.3e-01" in report.summary()) == halved
