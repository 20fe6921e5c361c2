"""What training with routers is to show, read off the results: each claim with the figures it stands on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.papers.results import Results
from benchmarks.papers.run_names import DEEPENED, DLO, ORIGINAL
from benchmarks.papers.shipped import SPEED
from benchmarks.papers.skipping_cost import AS_ASKED, BASELINES, TEXTS, WAYS, compared_as_asked

_NEAR_DENSE = 1.05  # perplexity of the deepened, routed model over that of the dense one
_RATE_WITHIN = 0.02
_OF_ALLOWED = 0.9  # of the decode speed-up that the active rate allows
_DISTILLED_AT = (0.9, 0.8)


@dataclass(frozen=True)
class Claim:
    """Whether something holds.

    Attributes:
        what: The claim.
        passed: Whether it does.
        figures: It stands on.
    """

    what: str
    passed: bool
    figures: dict[str, Any]


def claims(results: Results) -> Iterator[Claim]:
    """Every claim that there are results for; those of runs that diverged do not hold."""
    for run, values in results.found("train-").items():
        if values.get("diverged"):
            yield Claim(f"{run} converges", False, {"diverged": values["diverged"]})
            continue
        if values.get("rate_control"):
            control = values["rate_control"]
            near = abs(control["after"] - control["target"]) <= _RATE_WITHIN
            yield Claim(f"{run}: active rate", near, {key: control[key] for key in ("target", "before", "after")})
        yield from _against_others(results, run, values)
    if DEEPENED in results:
        yield from _deepened(results)
    if SPEED in results:
        yield from _shipped(results)


def _against_others(results: Results, run: str, values: dict[str, Any]) -> Iterator[Claim]:
    """As trained, on the domains; and at the rate that was asked for, on each text."""
    for way in _rivals(values):
        if (name := f"{BASELINES}train-{run}") in results:
            yield _better(f"{run} against {way}", values["all"], results[name][way]["all"])
        if (name := f"{AS_ASKED}train-{run}") in results:
            for text in TEXTS:
                found = compared_as_asked(results, results[name], text)
                yield _better(f"{run} against {way}, as asked, {text}", found["trained"], found[way])


def _rivals(values: dict[str, Any]) -> Sequence[str]:
    """What a run is to be better than: of those whose weights do not learn, static removal alone."""
    if values["kind"] != "distilled":
        return WAYS
    return ("static",) if values["target"] in _DISTILLED_AT else ()


def _better(what: str, own: dict[str, Any], theirs: dict[str, Any]) -> Claim:
    figures = {"perplexity": own["perplexity"], "active": own["active"]}
    others = {"their_perplexity": theirs["perplexity"], "their_active": theirs["active"]}
    # A perplexity beyond float64 is kept as None.
    bound = float("inf") if theirs["perplexity"] is None else theirs["perplexity"]
    return Claim(what, figures["perplexity"] is not None and figures["perplexity"] < bound, figures | others)


def _deepened(results: Results) -> Iterator[Claim]:
    dense = results[DEEPENED]
    if dense.get("diverged"):
        return
    found = {"deepened": dense["all"]["perplexity"]}
    if ORIGINAL in results and "all" in results[ORIGINAL]:
        found["original"] = results[ORIGINAL]["all"]["perplexity"]
    for run, values in results.found(DLO).items():
        if not values.get("diverged"):
            own = values["all"]["perplexity"]
            ratio = own / found["deepened"]
            figures = {"dlo": own, **found, "ratio": ratio, "bar": _NEAR_DENSE}
            yield Claim(f"dlo{run} against deepened, dense", ratio <= _NEAR_DENSE, figures)


def _shipped(results: Results) -> Iterator[Claim]:
    verdict = results[f"shipped-{DLO}"]["parity"]
    yield Claim("dlo, exported: parity", verdict == "PASS", {"parity": verdict})
    speed = results[SPEED]
    found = speed["timings"][DLO]["decode_ratio"]["median"]
    allowed = speed["allowed"]["decode"]["median"]
    values = {"speed_up": found, "allowed": allowed, "bar": _OF_ALLOWED}
    yield Claim("dlo, exported: decode speed", found >= _OF_ALLOWED * allowed, values)
