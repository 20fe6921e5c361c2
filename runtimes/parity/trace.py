"""A case on a runner: outputs of all steps, and the decisions they were made with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dlo_export.runtimes.parity.cases import Case
from dlo_export.runtimes.parity.statistics import stream_errors
from dlo_export.runtimes.runner import Decisions, FloatArray, Int64Array, Runner
from dlo_export.runtimes.runner import decisions as decide


@dataclasses.dataclass(frozen=True)
class Trace:
    """Outputs of a case's steps, joined.

    Attributes:
        logits: float32 [batch, tokens, vocab], of the tokens that show.
        shown: Columns of the tokens whose logits the model gives out, ascending: all, or the last of each step.
        scores: By routed layer, float32 [batch, tokens].
        decisions: Per step, to force on another runner; None where nothing is routed.
    """

    logits: FloatArray
    shown: Int64Array
    scores: dict[int, FloatArray]
    decisions: tuple[Decisions, ...] | None


def trace_reference(reference: Runner, case: Case) -> Trace:
    """Runs a case as it says: its forcing, or else the reference's own routers, decide."""
    forced = case.forced(reference.routed_layers)
    trace = trace_case(reference, case, forced)
    return trace if forced is not None else with_own_decisions(trace, case, reference.thresholds)


def with_own_decisions(trace: Trace, case: Case, thresholds: Mapping[int, float]) -> Trace:
    """A trace of routers that decided, with what they decided.

    Args:
        trace: Without decisions, its scores shown; returned as it is where nothing is routed.
        case: That was fed.
        thresholds: Of the routers, by layer, where they are not one half.
    """
    if not trace.scores:
        return trace
    ends = np.cumsum([feed.input_ids.shape[1] for feed in case.feeds])[:-1]
    active = {layer: np.split(rows, ends, axis=1) for layer, rows in decide(trace.scores, thresholds).items()}
    own = tuple({layer: steps[index] for layer, steps in active.items()} for index in range(len(case.feeds)))
    return dataclasses.replace(trace, decisions=own)


def trace_case(runner: Runner, case: Case, decisions: Sequence[Decisions] | None) -> Trace:
    """Runs a case under given decisions, or under the runner's own.

    Args:
        runner: Reset first.
        case: What to feed.
        decisions: Per step.
    """
    runner.reset(case.batch)
    steps = [
        runner.step(
            feed.input_ids,
            feed.attention_mask,
            feed.position_ids,
            force_active=None if decisions is None else decisions[index],
            last_logits=runner.last_logits_only,
        )
        for index, feed in enumerate(case.feeds)
    ]
    scores = {
        layer: np.concatenate([step.router_scores[layer] for step in steps], 1) for layer in steps[0].router_scores
    }
    logits = np.concatenate([step.logits for step in steps], 1)
    ends = np.cumsum([feed.input_ids.shape[1] for feed in case.feeds])
    shown = ends - 1 if runner.last_logits_only else np.arange(ends[-1])
    return Trace(logits, shown, scores, None if decisions is None else tuple(decisions))


def compare_streams(reference: Runner, candidate: Runner, case: Case, wanted: Trace) -> dict[int, float]:
    """How far the residual streams are apart, by layer, as `stream_errors` measures it.

    Args:
        reference: Exposes residual streams.
        candidate: Exposes them too, and takes decisions where anything is routed.
        case: What to feed.
        wanted: Of the reference, on that case.
    """
    streams: list[list[Mapping[int, FloatArray]]] = []
    for runner in (reference, candidate):
        runner.reset(case.batch)
        streams.append([])
        for index, feed in enumerate(case.feeds):
            result = runner.step(
                feed.input_ids,
                feed.attention_mask,
                feed.position_ids,
                force_active=None if wanted.decisions is None else wanted.decisions[index],
                last_logits=runner.last_logits_only,
                hidden_states=True,
            )
            streams[-1].append(result.hidden_states)
    wanted_streams, found_streams = streams
    return stream_errors(wanted_streams, found_streams, [feed.real for feed in case.feeds])
