"""Compares runners with a reference: decisions, logits under the reference's decisions, greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from runtimes.parity_cases import Case, Feed
from runtimes.parity_report import CaseResult, Flip, ParityReport, Tolerance, largest_difference
from runtimes.runner import Runner, StepResult

OpenRunner = Callable[[], AbstractContextManager[Runner]]


@dataclass(frozen=True)
class Candidate:
    """Something to compare with the reference, opened when its turn comes.

    Attributes:
        name: For the report.
        open_forced: A runner that takes the decisions of routed layers from outside (the plain one where none is).
        open_free: One whose routers decide.
    """

    name: str
    open_forced: OpenRunner
    open_free: OpenRunner


def compare(
    reference: Runner,
    candidates: Sequence[Candidate],
    cases: Sequence[Case],
    tolerance: Tolerance,
    *,
    greedy_prompt: np.ndarray | None = None,
    greedy_tokens: int = 16,
    hidden_states: bool = False,
) -> ParityReport:
    """Runs every case on the reference and on every candidate.

    Candidates are fed the reference's decisions, so that one near-tie that falls the other way does not hide what else
    differs; what their own routers would have decided is compared apart, with the margin.

    Args:
        reference: What is right.
        candidates: What to compare with it.
        cases: What to feed.
        tolerance: Of the candidates' dtype.
        greedy_prompt: int64 [1, tokens]; None leaves the greedy comparison out.
        greedy_tokens: How many tokens to generate.
        hidden_states: Compare residual streams too and name the first layer whose is off; candidates must expose them.
    """
    expected = [_run_reference(reference, case, hidden_states) for case in cases]
    expected_tokens = greedy(reference, greedy_prompt, greedy_tokens) if greedy_prompt is not None else []
    report = ParityReport(tolerance)
    for candidate in candidates:
        with candidate.open_forced() as runner:
            for case, steps in zip(cases, expected, strict=True):
                report.results.append(_compare(candidate.name, runner, case, steps, tolerance, hidden_states))
        if greedy_prompt is not None:
            with candidate.open_free() as runner:
                report.greedy[candidate.name] = (expected_tokens, greedy(runner, greedy_prompt, greedy_tokens))
    return report


def greedy(runner: Runner, prompt: np.ndarray, tokens: int) -> list[int]:
    """The most likely continuation, token by token, routers deciding.

    Args:
        runner: Any.
        prompt: int64 [1, tokens].
        tokens: How many to generate; an end-of-sequence token does not stop it.
    """
    runner.reset(1)
    generated: list[int] = []
    ids, length = prompt, prompt.shape[1]
    for _ in range(tokens):
        positions = np.arange(length - ids.shape[1], length)[np.newaxis]
        result = runner.step(ids, np.ones((1, length), np.int64), positions)
        generated.append(int(result.logits[0, -1].argmax()))
        ids, length = np.array([[generated[-1]]], np.int64), length + 1
    return generated


@dataclass(frozen=True)
class _Expected:
    """A pass of the reference: its result and the decisions it was made with."""

    result: StepResult
    decisions: dict[int, np.ndarray]


def _run_reference(reference: Runner, case: Case, hidden_states: bool) -> list[_Expected]:
    reference.reset(case.batch)
    steps = []
    for feed in case.feeds:
        forced = case.forced(feed, reference.routed_layers)
        result = reference.step(
            feed.input_ids,
            feed.attention_mask,
            feed.position_ids,
            force_active=forced,
            hidden_states=hidden_states,
        )
        own = {layer: scores > 0.5 for layer, scores in result.router_scores.items()}
        steps.append(_Expected(result, own if forced is None else forced))
    return steps


def _compare(
    name: str,
    runner: Runner,
    case: Case,
    expected: Sequence[_Expected],
    tolerance: Tolerance,
    hidden_states: bool,
) -> CaseResult:
    runner.reset(case.batch)
    compared = decisions = 0
    differences, references = [0.0], [0.0]
    flips: list[Flip] = []
    diverging: int | None = None
    for feed, step in zip(case.feeds, expected, strict=True):
        got = runner.step(
            feed.input_ids,
            feed.attention_mask,
            feed.position_ids,
            force_active=step.decisions or None,
            hidden_states=hidden_states,
        )
        real = feed.real
        wanted, found = step.result.logits[real], got.logits[real]
        compared += wanted.size
        differences.append(largest_difference(wanted, found))
        references.append(float(np.abs(wanted).max(initial=0.0)))
        for layer, scores in step.result.router_scores.items():
            decisions += int(real.sum())
            flips += _flips(layer, scores, got.router_scores[layer], real)
        if diverging is None:
            diverging = _first_diverging_layer(step.result, got, feed, tolerance)
    return CaseResult(
        case.name,
        name,
        compared,
        float(np.max(differences)),  # NaN wins
        max(references),
        decisions,
        tuple(flips),
        diverging,
    )


def _flips(layer: int, wanted: np.ndarray, found: np.ndarray, real: np.ndarray) -> list[Flip]:
    rows, positions = np.nonzero(((wanted > 0.5) != (found > 0.5)) & real)
    return [
        Flip(layer, int(row), int(position), float(wanted[row, position]), float(found[row, position]))
        for row, position in zip(rows, positions, strict=True)
    ]


def _first_diverging_layer(wanted: StepResult, found: StepResult, feed: Feed, tolerance: Tolerance) -> int | None:
    for layer in sorted(wanted.hidden_states.keys() & found.hidden_states.keys()):
        stream = wanted.hidden_states[layer][feed.real]
        difference = largest_difference(stream, found.hidden_states[layer][feed.real])
        # Residual streams have a few huge dimensions; an error in the tolerance's proportion of them is still noise.
        if not difference <= tolerance.logits * max(1.0, float(np.abs(stream).max(initial=0.0)) / 10):
            return layer
    return None
