"""Compares runners with a reference: decisions, logits under the reference's decisions, greedy tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.runtimes.generation.generate import Generation
from dlo_export.runtimes.generation.sampling import LogitsError
from dlo_export.runtimes.parity.case_result import CaseResult, OwnRun
from dlo_export.runtimes.parity.cases import Case, step_feeds
from dlo_export.runtimes.parity.greedy_result import GreedyDifference, GreedyResult
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.statistics import (
    LogitStatistics,
    first_diverging_layer,
    flips,
    logit_statistics,
    own_error,
    score_statistics,
)
from dlo_export.runtimes.parity.tolerances import TOLERANCES, Tolerance
from dlo_export.runtimes.parity.trace import Trace, compare_streams, trace_case, trace_reference, with_own_decisions
from dlo_export.runtimes.runner import FloatArray, Runner

OpenRunner = Callable[[], AbstractContextManager[Runner]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to compare with the reference; its builds are opened one at a time, when their turn comes.

    Attributes:
        name: For the report.
        open_free: The graph as released: its routers decide, and need not show.
        open_forced: A build that takes decisions and shows scores; None where nothing is routed.
        open_streams: The forced build (the free one where nothing is routed) with residual streams exposed, to name the
            first diverging layer; opened only where logits differ.
        open_shown: A build whose routers decide, and show it; opened only where decisions flipped. None leaves open
            what such decisions lead to.
    """

    name: str
    open_free: OpenRunner
    open_forced: OpenRunner | None = None
    open_streams: OpenRunner | None = None
    open_shown: OpenRunner | None = None


@dataclasses.dataclass(frozen=True)
class OtherPrecision:
    """The reference in another precision: how far the two are apart tells rounding from a fault.

    Attributes:
        open: Opens it.
        is_exact: Whether it is the more exact one of the two.
        compared: Which is off which, in words for a report.
    """

    open: OpenRunner
    is_exact: bool
    compared: str

    @classmethod
    def of_pytorch(cls, dtype: str, opened: Callable[[str], AbstractContextManager[Runner]]) -> OtherPrecision:
        """Of a PyTorch model in float32: float64 for candidates in fp32, their own type for those of 16 bits.

        Args:
            dtype: Of the candidates.
            opened: Opens the model in a type, by PyTorch's name of it.
        """
        if dtype == "fp32":
            return cls(functools.partial(opened, "float64"), True, "its own fp32 is off float64")
        name = BY_OPTION[dtype].name
        return cls(functools.partial(opened, name), False, f"PyTorch's own {dtype} is off its fp32")


def compare(
    reference: Runner,
    candidates: Sequence[Candidate],
    cases: Sequence[Case],
    *,
    dtype: str,
    greedy_prompts: Sequence[Sequence[int]] = (),
    greedy_tokens: int = 32,
    other: OtherPrecision | None = None,
    steps_matter: bool = False,
) -> ParityReport:
    """Runs every case on the reference and on every candidate.

    Candidates are fed the reference's decisions, so that one near-tie that falls the other way does not hide what else
    differs; what their own routers would have decided is compared apart, with the margin. The released graph, whose
    routers nobody sees, must then agree wherever no decision flipped; where one did, with the reference made to decide
    as the candidate does.

    Args:
        reference: What is right; open.
        candidates: What to compare with it.
        cases: What to feed.
        dtype: Of the candidates, a key of TOLERANCES.
        greedy_prompts: Left-padded into one batch; none leave the greedy comparison out.
        greedy_tokens: How many tokens to generate per prompt.
        other: Opened only where a case would fail or something flipped: float64 for candidates in fp32, their own type
            for those of 16 bits. None leaves the table's tolerances as they are, and what flipped ambiguous.
        steps_matter: Whether the same tokens in other steps are another result: by a rope that depends on the length,
            or by kernels that both models run. Generated tokens are then refed as they were fed, not all at once.

    Raises:
        RuntimeInputError: A candidate is another kind of model, or cannot be opened.
    """
    tolerance = TOLERANCES[dtype]
    traces = [trace_reference(reference, case) for case in cases]
    comparisons = [
        _Comparison(reference, candidate, tolerance, cases, traces, other, steps_matter=steps_matter)
        for candidate in candidates
    ]
    for comparison in comparisons:
        comparison.run(greedy_prompts, greedy_tokens)
    return ParityReport(
        reference.name,
        dtype,
        tolerance,
        tuple(result for comparison in comparisons for result in comparison.results),
        tuple(comparison.greedy for comparison in comparisons if comparison.greedy is not None),
    )


def _logit_statistics(wanted: Trace, found: Trace, case: Case) -> LogitStatistics:
    """Of the tokens whose logits both show; places are columns of all."""
    shown, of_wanted, of_found = np.intersect1d(wanted.shown, found.shown, return_indices=True)
    compared = logit_statistics(wanted.logits[:, of_wanted], found.logits[:, of_found], case.real[:, shown])
    return dataclasses.replace(compared, position=int(shown[compared.position]))


class _Comparison:
    """One candidate's turn."""

    def __init__(
        self,
        reference: Runner,
        candidate: Candidate,
        tolerance: Tolerance,
        cases: Sequence[Case],
        traces: Sequence[Trace],
        other: OtherPrecision | None,
        *,
        steps_matter: bool,
    ) -> None:
        self._reference = reference
        self._candidate = candidate
        self._tolerance = tolerance
        self._cases = list(cases)
        self._traces = list(traces)
        self._other = other
        self._steps_matter = steps_matter
        self._free_traces: dict[str, Trace] = {}
        self._found_traces: list[Trace] = []
        self._own_traces: dict[str, Trace] = {}  # of the reference, under the candidate's decisions
        self._tokens: list[list[int]] = []
        self._not_finite = False
        self.results: list[CaseResult] = []
        self.greedy: GreedyResult | None = None

    def run(self, greedy_prompts: Sequence[Sequence[int]], greedy_tokens: int) -> None:
        """Opens one build after the other."""
        with self._candidate.open_free() as runner:
            if greedy_prompts:
                self._generate(runner, greedy_prompts, greedy_tokens)
            if self._candidate.open_forced is None:
                self._compare_cases(runner)
            else:
                self._compare_free(runner)
        if self._candidate.open_forced is not None:
            with self._candidate.open_forced() as runner:
                self._compare_cases(runner)
        self._run_own_decisions()
        if self._tokens:
            # The refed tokens are the last case.
            self.greedy = self._compare_greedy()
        self._measure_own_errors()
        differing = [i for i, result in enumerate(self.results) if self._logits_differ(result)]
        if differing and self._candidate.open_streams is not None:
            with self._candidate.open_streams() as runner:
                for index in differing:
                    self._compare_streams(runner, index)
        # All logits of this candidate, which nobody asks for any more: the next one has as many.
        self._free_traces, self._own_traces, self._found_traces = {}, {}, []

    def _run_own_decisions(self) -> None:
        """Where decisions flipped that are the candidate's to take, makes the reference take them."""
        names = [result.case for result in self.results if result.flips and result.case in self._free_traces]
        if not names or self._candidate.open_shown is None:
            return
        with self._candidate.open_shown() as runner:
            for index, case in enumerate(self._cases):
                if case.name not in names:
                    continue
                shown = with_own_decisions(trace_case(runner, case, None), case, self._reference.thresholds)
                wanted = trace_case(self._reference, case, shown.decisions)
                flipped = tuple(flips(wanted.scores, shown.scores, case.real, self._reference.thresholds))
                logits = _logit_statistics(wanted, self._free_traces[case.name], case)
                self.results[index] = dataclasses.replace(self.results[index], own_run=OwnRun(logits, flipped))
                self._own_traces[case.name] = wanted

    def _measure_own_errors(self) -> None:
        """Where a case would fail by the table, or something flipped, asks how exact PyTorch itself is there."""
        doubtful = {i for i, result in enumerate(self.results) if result.judge(self._tolerance).verdict != "PASS"}
        if self.greedy is not None and self.greedy.differences:
            doubtful.add(len(self.results) - 1)
        measurable = [i for i in sorted(doubtful) if math.isfinite(self.results[i].logits.mean)]
        if self._other is None or not measurable:
            return
        with self._other.open() as other:
            for index in measurable:
                case, trace = self._cases[index], self._traces[index]
                found = trace_case(other, case, trace.decisions)
                exact, rounded = (found, trace) if self._other.is_exact else (trace, found)
                own = own_error(
                    exact.logits, rounded.logits, exact.scores, rounded.scores, case.real, self._other.compared
                )
                self.results[index] = dataclasses.replace(self.results[index], own_error=own)
                if self.greedy is not None and index == len(self.results) - 1:
                    self.greedy = self._with_rounding(self.greedy, np.abs(exact.logits - rounded.logits).max(-1))

    def _logits_differ(self, result: CaseResult) -> bool:
        tolerance = self._tolerance if result.own_error is None else self._tolerance.widened(result.own_error)
        return result.logits.compared > 0 and not result.logits.within(tolerance)

    def _generate(self, runner: Runner, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """Generates greedily, and makes what was fed meanwhile a case for the reference."""
        generation = Generation(runner, prompts, max_new_tokens=tokens)
        try:
            for _ in generation:
                pass
        except LogitsError:
            self._not_finite = True  # a judgement like any other: the report says where, and what the cases show
        self._tokens = generation.sequences
        fed = [np.array([*prompt, *new[:-1]]) for prompt, new in zip(prompts, self._tokens, strict=True)]
        # A model that shows each step's last logits only has to be fed token by token to show them all.
        stepwise = self._steps_matter or runner.last_logits_only or self._reference.last_logits_only
        steps = (1,) * (len(self._tokens[0]) - 1) if stepwise else ()
        self._cases.append(Case("greedy tokens, refed", step_feeds(fed, *steps)))
        self._traces.append(trace_reference(self._reference, self._cases[-1]))

    def _compare_free(self, runner: Runner) -> None:
        for case in self._cases:
            if case.forcing is None:
                self._free_traces[case.name] = trace_case(runner, case, None)

    def _compare_cases(self, runner: Runner) -> None:
        self._found_traces = [
            trace_case(runner, case, wanted.decisions) for case, wanted in zip(self._cases, self._traces, strict=True)
        ]
        for case, wanted, found in zip(self._cases, self._traces, self._found_traces, strict=True):
            free = self._free_traces.get(case.name)
            self.results.append(
                CaseResult(
                    case=case.name,
                    candidate=self._candidate.name,
                    logits=_logit_statistics(wanted, found, case),
                    free_logits=None if free is None else _logit_statistics(wanted, free, case),
                    decisions=len(wanted.scores.keys() & found.scores.keys()) * int(case.real.sum()),
                    flips=tuple(flips(wanted.scores, found.scores, case.real, self._reference.thresholds)),
                    scores=score_statistics(wanted.scores, found.scores, case.real),
                )
            )

    def _compare_greedy(self) -> GreedyResult:
        """Compares new tokens with the reference's, under the candidate's own decisions where they are known."""
        name = self._cases[-1].name
        wanted, found, flipped = self._traces[-1], self._found_traces[-1], self.results[-1].flips
        if name in self._own_traces:
            wanted, found, flipped = self._own_traces[name], self._free_traces[name], ()
        tokens = np.array(self._tokens)  # all of one length, because no end token stops them
        first = wanted.logits.shape[1] - tokens.shape[1]
        differences = []
        for row, sequence in enumerate(tokens):
            differing = np.flatnonzero(wanted.logits[row, first:].argmax(-1) != sequence)
            if not differing.size:
                continue
            index = int(differing[0])
            logits, column = wanted.logits[row, first + index], wanted.shown[first + index]
            earlier = [flip for flip in flipped if flip.row == row and flip.position <= column]
            differences.append(
                GreedyDifference(
                    row=row,
                    index=index,
                    gap=float(logits.max() - logits[sequence[index]]),
                    error=float(np.abs(found.logits[row, found.shown == column] - logits).max()),
                    flips=len(earlier),
                )
            )
        return GreedyResult(
            self._candidate.name,
            tuple(tuple(sequence) for sequence in tokens.tolist()),
            tuple(differences),
            self._not_finite,
        )

    def _with_rounding(self, greedy: GreedyResult, errors: FloatArray) -> GreedyResult:
        """The same with the reference's own errors, [batch, tokens], where tokens differ."""
        first = errors.shape[1] - len(self._tokens[0])
        differences = [
            dataclasses.replace(difference, rounding=float(errors[difference.row, first + difference.index]))
            for difference in greedy.differences
        ]
        return dataclasses.replace(greedy, differences=tuple(differences))

    def _compare_streams(self, runner: Runner, index: int) -> None:
        errors = compare_streams(self._reference, runner, self._cases[index], self._traces[index])
        self.results[index] = dataclasses.replace(
            self.results[index],
            stream_errors=errors,
            first_diverging_layer=first_diverging_layer(errors, self._tolerance),
        )
