"""The results as pictures, where matplotlib is installed (benchmarks/requirements-papers.txt)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.papers.results import Results
from benchmarks.papers.run_names import SHIPPED
from benchmarks.papers.shipped import SPEED
from benchmarks.papers.skipping_cost import BASELINES, CALIBRATED, GREEDY, INFLUENCE, RETARGETED
from benchmarks.papers.tables import COSTS
from benchmarks.papers.token_kinds import KINDS
from benchmarks.papers.token_kinds import PREFIX as KINDS_PREFIX


def save_plots(results: Results) -> list[Path] | None:
    """Draws what there are results for; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl  # noqa: PLC0415 - not needed for the results themselves

    mpl.use("Agg")
    folder = results.folder / "plots"
    folder.mkdir(exist_ok=True)
    runs = {name: values for name, values in results.found("train-").items() if "diverged" not in values}
    saved = []
    if runs and COSTS in results:
        saved.append(_curves(folder, runs, results[COSTS]["flops"]))
    if results.found(BASELINES):
        saved.append(_skipping(folder, results))
    if SPEED in results:
        saved.append(_speed(folder, results))
    return saved + [_kinds(folder, name, values) for name, values in results.found(KINDS_PREFIX).items()]


def _curves(folder: Path, runs: Mapping[str, Any], flops: Mapping[str, float]) -> Path:
    """(b) Held-out loss against tokens and against FLOPs."""
    figure, axes = _figure(2)
    for name, values in runs.items():
        if values["kind"] in ("routed", "distilled"):
            continue
        tokens = [point["tokens"] for point in values["curve"]]
        losses = [point["loss"] for point in values["curve"]]
        axes[0].plot(tokens, losses, marker=".", label=name)
        axes[1].plot([count * flops[values["kind"]] for count in tokens], losses, marker=".", label=name)
    for axis, label in zip(axes, ("tokens", "FLOPs"), strict=True):
        axis.set(xlabel=label, ylabel="loss of the held-out mix")
    axes[1].legend(fontsize="x-small")
    return _saved(figure, folder / "loss-against-training.png")


def _skipping(folder: Path, results: Results) -> Path:
    """(c) Perplexity against active rate."""
    figure, (axis,) = _figure(1)
    points: dict[str, list[tuple[float, float | None]]] = {}
    routed = {"trained": "train-routed-", "moved by thresholds": RETARGETED, "distilled": "train-distilled-"}
    for name, prefix in {**routed, "calibrated": CALIBRATED}.items():
        found = [values["all"] for values in results.found(prefix).values() if "diverged" not in values]
        points[name] = [(each["active"], each["perplexity"]) for each in found]
    for baselines in results.found(BASELINES).values():
        for way in ("calibrated", "static", "random, same layers"):
            if way in baselines:
                found = baselines[way]["all"]
                points.setdefault(way, []).append((found["active"], found["perplexity"]))
    for name, way in ((INFLUENCE, "layers by influence"), (GREEDY, "layers, greedily")):
        if name in results:
            values = results[name]
            points[way] = [
                (1 - count / values["layers"], values[f"{float(target):.2f}"]["all"]["perplexity"])
                for target, count in values["removed"].items()
            ]
    for name, places in points.items():
        known = sorted(place for place in places if place[1] is not None)
        axis.plot([x for x, _ in known], [y for _, y in known], marker=".", linewidth=0.8, label=name)
    axis.set(xlabel="share of MLPs (or layers) that run", ylabel="perplexity", yscale="log")
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which("{x:g}")
    axis.legend(fontsize="small")
    return _saved(figure, folder / "perplexity-against-active-rate.png")


def _speed(folder: Path, results: Results) -> Path:
    """(d) Perplexity against latency."""
    figure, axes = _figure(2)
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        for name in SHIPPED:
            spread = results[SPEED]["timings"][name][f"{phase}_seconds"]
            low, high = spread["median"] - spread["p10"], spread["p90"] - spread["median"]
            error = [[low * 1e3], [high * 1e3]]
            perplexity = results[f"shipped-{name}"]["perplexity"]
            label = name.removeprefix("train-")
            axis.errorbar(spread["median"] * 1e3, perplexity, xerr=error, marker="o", linestyle="none", label=label)
        axis.set(xlabel=f"{phase}, ms", ylabel="perplexity")
    axes[1].legend(fontsize="small")
    return _saved(figure, folder / "perplexity-against-latency.png")


def _kinds(folder: Path, name: str, values: Mapping[str, Any]) -> Path:
    """(e) Heat map of skipped tokens."""
    figure, (axis,) = _figure(1)
    shares = [values["skipped"][str(layer)] for layer in values["layers"]]
    picture = axis.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(KINDS)), KINDS, rotation=30, ha="right")
    labels = [f"{layer} +" if layer in values["injected"] else str(layer) for layer in values["layers"]]
    axis.set_yticks(range(len(labels)), labels, fontsize="xx-small")
    axis.set(ylabel="layer (+ injected)", title="share of tokens that skip")
    figure.colorbar(picture)
    return _saved(figure, folder / f"skipped-{name}.png")


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, columns, figsize=(6 * columns, 4.5), squeeze=False)
    return figure, axes[0]


def _saved(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure.tight_layout()
    figure.savefig(file, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)
    return file
