"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.papers.expansion_loss import BASE
from benchmarks.papers.expansion_loss import PREFIX as EXPANDED
from benchmarks.papers.results import Results
from benchmarks.papers.run_names import SHIPPED
from benchmarks.papers.shipped import SPEED
from benchmarks.papers.skipping_cost import AS_ASKED, BASELINES, GREEDY, INFLUENCE, TEXTS, WAYS, compared_as_asked
from benchmarks.papers.tasks import PREFIX as TASKS
from benchmarks.papers.text import DOMAINS
from benchmarks.papers.token_kinds import KINDS
from benchmarks.papers.token_kinds import PREFIX as KINDS_PREFIX

KEPT_WITHIN = 1e-5
"""Nats, by domain, within which a method that keeps the function must have the original's loss."""
COSTS = "training-costs"


def all_tables(results: Results, heading: str) -> str:
    """Everything there is, as one document.

    Args:
        results: To read.
        heading: What it was run with.
    """
    parts = [heading]
    for title, rows in (
        ("(a) Loss right after expansion", _expansion(results)),
        ("(b) Loss after training", _training(results)),
        ("(c) Perplexity against active rate", _skipping(results)),
        *((f"(c) At the rate asked for, {text}", _as_asked(results, text)) for text in TEXTS),
        *((f"(c) At the rate asked for, {text}, mean over seeds", _seeds_as_asked(results, text)) for text in TEXTS),
        ("(c) Trained routers, mean over seeds (lowest to highest)", _seeds(results)),
        ("(c) Whole layers removed", _removed(results)),
        ("(d) What is shipped", _shipped(results)),
        ("(d) Accuracy of what is shipped", _accuracies(results)),
        *_kinds(results),
    ):
        header, *cells = rows
        if cells:
            parts.append(f"## {title}\n\n{markdown(header, cells)}")
    if left_out := results.left_out:
        lines = "\n".join(f"* {name}: {reason}" for name, reason in left_out.items())
        parts.append(f"## Left out\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def broken_promises(results: Results) -> list[str]:
    """Methods that are to keep the function and do not."""
    if BASE not in results:
        return []
    base = results[BASE]["domains"]
    return [
        values["method"]
        for values in results.found(EXPANDED).values()
        if values["keeps_the_function"]
        and not all(abs(values["domains"][domain]["loss"] - base[domain]["loss"]) <= KEPT_WITHIN for domain in DOMAINS)
    ]


def _expansion(results: Results) -> Iterator[Sequence[str]]:
    yield ["method", "layers", "parameters, M", *(f"{domain}, loss" for domain in DOMAINS), "mean, minus original"]
    found = results.found(EXPANDED)
    base = found.pop("original", None)
    if base is None:
        return
    for values in [base, *sorted(found.values(), key=lambda row: (row["all"]["loss"] or 1e9, row["method"]))]:
        yield [
            values["method"],
            str(values["layers"]),
            f"{values['parameters'] / 1e6:.3g}",
            *(_number(values["domains"][domain]["loss"], ".4f") for domain in DOMAINS),
            _difference(values["all"]["loss"], base["all"]["loss"]),
        ]


def _training(results: Results) -> Iterator[Sequence[str]]:
    yield [
        "run",
        "tokens",
        "FLOPs per token",
        "FLOPs",
        "active MLPs",
        "watched: active MLPs",
        "loss",
        *(f"{domain}, perplexity" for domain in DOMAINS),
        "all",
        "tokens/s",
    ]
    if COSTS not in results:
        return
    flops = results[COSTS]["flops"]
    for name, values in results.found("train-").items():
        if "diverged" in values:
            yield [name, "diverged", *[""] * (len(DOMAINS) + 7)]
            continue
        per_token = flops[values["kind"]]
        yield [
            name,
            f"{values['tokens']:,}",
            f"{per_token:.3g}",
            f"{per_token * values['tokens']:.3g}",
            f"{values['all']['active']:.1%}",
            _watched_rate(values),
            _number(values["curve"][-1]["loss"], ".4f"),
            *(_number(part["perplexity"], ".2f") for part in (*map(values["domains"].get, DOMAINS), values["all"])),
            f"{values['tokens_per_second']:,.0f}",
        ]


def _watched_rate(values: Mapping[str, Any]) -> str:
    """Share of all MLPs that run on the text thresholds are fitted to, of its half that they are not fitted on."""
    control, target = values["rate_control"], values["target"]
    if control is None or target == 1:
        return "100.0%" if target is None else ""
    routed = (1 - target) / (1 - control["target"])  # share of layers, since one target was made of the other
    return f"{1 - routed * (1 - control['after']):.1%}"


def _skipping(results: Results) -> Iterator[Sequence[str]]:
    yield ["routers", "asked for", "active MLPs", "perplexity", *(f"{way}, as many" for way in WAYS)]
    for baselines in results.found(BASELINES).values():
        values = results[baselines["of"]]
        if "diverged" in values:
            yield [baselines["of"], f"{values.get('target')}", "diverged", *[""] * len(WAYS)]
            continue
        name = baselines["of"].removeprefix("train-").removeprefix("skipping-")
        yield [
            name,
            f"{values['target']:.0%}",
            f"{values['all']['active']:.1%}",
            _number(values["all"]["perplexity"], ".2f"),
            *(_number(baselines[way]["all"]["perplexity"], ".2f") if way in baselines else "" for way in WAYS),
        ]


def _as_asked(results: Results, text: str) -> Iterator[Sequence[str]]:
    """Perplexity of all, thresholds moved so that the rate on the very text is the one that was asked for."""
    yield ["routers", "asked for", "active MLPs", "perplexity", *WAYS]
    for values in results.found(AS_ASKED).values():
        name, target = values["of"].removeprefix("train-"), f"{values['target']:.0%}"
        if "diverged" in values:
            yield [name, target, "diverged", *[""] * (1 + len(WAYS))]
            continue
        found = compared_as_asked(results, values, text)
        own = found.pop("trained")
        others = (_number(found[way]["perplexity"], ".2f") for way in WAYS)
        yield [name, target, f"{own['active']:.1%}", _number(own["perplexity"], ".2f"), *others]


def _seeds_as_asked(results: Results, text: str) -> Iterator[Sequence[str]]:
    yield ["asked for", "seeds", "perplexity", *WAYS]
    by_target: dict[float, list[dict[str, dict[str, Any]]]] = {}
    for values in results.found(f"{AS_ASKED}train-routed-").values():
        if "diverged" not in values:
            by_target.setdefault(values["target"], []).append(compared_as_asked(results, values, text))
    for target, compared in sorted(by_target.items(), reverse=True):
        ways = (_spread([found[way]["perplexity"] for found in compared], ".2f") for way in ("trained", *WAYS))
        yield [f"{target:.0%}", str(len(compared)), *ways]


def _seeds(results: Results) -> Iterator[Sequence[str]]:
    """All seeds that were trained; what skips as much, of those that it was measured for."""
    yield ["asked for", "seeds", "active MLPs", "perplexity", "compared", *(f"{way}, as many" for way in WAYS)]
    by_target: dict[float, dict[str, dict[str, Any]]] = {}
    for name, values in results.found("train-routed-").items():
        if "diverged" not in values:
            by_target.setdefault(values["target"], {})[f"{BASELINES}train-routed-{name}"] = values["all"]
    for target, trained in sorted(by_target.items(), reverse=True):
        others = [results[name] for name in trained if name in results]
        yield [
            f"{target:.0%}",
            str(len(trained)),
            _spread([each["active"] for each in trained.values()], ".1%"),
            _spread([each["perplexity"] for each in trained.values()], ".2f"),
            str(len(others)),
            *(_spread([each[way]["all"]["perplexity"] for each in others], ".2f") for way in WAYS),
        ]


def _spread(values: Sequence[float | None], form: str) -> str:
    if not values:
        return ""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "over 1e308"
    return f"{sum(known) / len(known):{form}} ({min(known):{form}} to {max(known):{form}})"


def _removed(results: Results) -> Iterator[Sequence[str]]:
    yield ["layers chosen by", "removed", "layers left", "perplexity"]
    for name, way in ((INFLUENCE, "block influence"), (GREEDY, "greedy search")):
        if name not in results:
            continue
        values = results[name]
        for target, count in values["removed"].items():
            yield [
                way,
                str(count),
                f"{1 - count / values['layers']:.1%}",
                _number(values[f"{float(target):.2f}"]["all"]["perplexity"], ".2f"),
            ]


def _shipped(results: Results) -> Iterator[Sequence[str]]:
    yield [
        "model",
        "parity",
        "active, original / injected",
        "perplexity",
        "prefill, ms",
        "dense / it",
        "decode, ms",
        "dense / it",
    ]
    if SPEED not in results:
        return
    timings = results[SPEED]["timings"]
    for name in SHIPPED:
        values, times = results[f"shipped-{name}"], timings[name]
        active = [values["active"][kind] for kind in ("original", "injected")]
        yield [
            name.removeprefix("train-"),
            str(values["parity"]),
            " / ".join("" if rate is None else f"{rate:.1%}" for rate in active),
            _number(values["perplexity"], ".2f"),
            *_times(times, "prefill"),
            *_times(times, "decode"),
        ]
    allowed = results[SPEED]["allowed"]
    bounds = [f"{allowed[phase]['median']:.2f}" for phase in ("prefill", "decode")]
    yield ["what its active rate allows", "", "", "", "", bounds[0], "", bounds[1]]


def _accuracies(results: Results) -> Iterator[Sequence[str]]:
    yield ["task", "questions", *(name.removeprefix("train-") for name in SHIPPED)]
    found: dict[str, dict[str, Any]] = {}
    for values in results.found(TASKS).values():
        found.setdefault(values["task"], {})[values["model"]] = values
    for task, by_model in found.items():
        questions = next(iter(by_model.values()))["questions"]
        yield [task, str(questions), *(_estimate(by_model.get(name)) for name in SHIPPED)]


def _estimate(values: Mapping[str, Any] | None) -> str:
    """Accuracy and its standard error."""
    if values is None:
        return ""
    accuracy = values["accuracy"]
    return f"{accuracy['value']:.1%}" + (
        "" if accuracy["standard_error"] is None else f" ± {accuracy['standard_error']:.1%}"
    )


def _times(times: Mapping[str, Any], phase: str) -> list[str]:
    ratio = "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**times[f"{phase}_ratio"])
    return [f"{times[f'{phase}_seconds']['median'] * 1e3:.2f}", ratio]


def _kinds(results: Results) -> Iterator[tuple[str, Iterator[Sequence[str]]]]:
    for name, values in results.found(KINDS_PREFIX).items():

        def rows(values: Mapping[str, Any] = values) -> Iterator[Sequence[str]]:
            yield ["layer", *(f"{kind} ({values['tokens'][kind]:,})" for kind in KINDS)]
            for layer in values["layers"]:
                shown = f"{layer}, injected" if layer in values["injected"] else str(layer)
                yield [shown, *(f"{share:.0%}" for share in values["skipped"][str(layer)])]

        yield f"(e) Share of skipped tokens, {name.removeprefix('train-')}", rows()


def _number(value: float | None, form: str) -> str:
    return "over 1e308" if value is None else format(value, form)


def _difference(value: float | None, base: float) -> str:
    return (
        "over 700" if value is None else f"{value - base:+.1e}" if abs(value - base) < 1e-3 else f"{value - base:+.4f}"
    )
