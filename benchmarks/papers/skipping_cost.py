"""(c) Perplexity against active rate: routers, trained or not, and what skips as much without any.

What is not trained works on the original after the same fine-tuning, so that text counts for nobody. At the rate that
was asked for, to which thresholds are moved on the very text that is measured (the domains, and the mix that runs are
watched on), and at the rate that routers reach on the domains as they were trained, as much is skipped by

* static: whole MLPs, those that change the stream least; of the next one, a random share of the tokens;
* random: in each layer that has a router, tokens at random, at the routers' rate in that layer; and in every layer, at
  the mean rate;
* calibrated: routers fitted for the same target, moved to that rate by their thresholds. What is asked for on training
  text is not what routers reach on other text, and each kind of routers misses it in its own way.

Layers are removed whole as well, attention included: by block influence, and greedily.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.calibration_quality import by_similarity, static_rates
from benchmarks.papers.budget import Budget, Piece
from benchmarks.papers.expansion_loss import pass_seconds
from benchmarks.papers.experiment import DecideShape, Experiment
from benchmarks.papers.removal import greedily, without_layers
from benchmarks.papers.results import Results
from benchmarks.papers.run_names import ORIGINAL
from benchmarks.papers.subjects import saved_model
from benchmarks.papers.text import DOMAINS
from benchmarks.papers.training import TrainingRun
from dlo_export.modeling.calibration.evaluation import with_routers
from dlo_export.modeling.calibration.rate_control import sequence_scores, shift_thresholds
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM

CALIBRATED, RETARGETED, BASELINES = "skipping-calibrated-", "skipping-retargeted-", "skipping-as-much-as-"
AS_ASKED, UNTRAINED = "skipping-as-asked-", "skipping-untrained-"
INFLUENCE, GREEDY = "skipping-layers-by-influence", "skipping-layers-greedily"
WAYS = ("static", "random, same layers", "random, every layer", "calibrated")
"""What trained routers are compared with."""
TEXTS = ("domains", "watched")
"""What is compared at the rate that was asked for: the held-out domains, and the mix that runs are watched on."""


def calibrated_pieces(experiment: Experiment) -> list[Piece]:
    """Calibrated routers at the rates of the form."""
    form, measure = experiment.form, _measurements(experiment)
    calibration = form.calibration_tokens / _held_out_tokens(experiment)
    return [
        Piece(
            f"{CALIBRATED}{target:.2f}",
            _passes(experiment, 1 + 2 * calibration),
            functools.partial(measure.calibrated, target),
            (ORIGINAL,),
        )
        for target in form.targets
    ]


def calibrated_baselines(experiment: Experiment) -> list[Piece]:
    """What skips as much as calibrated routers do."""
    return as_many_pieces(experiment, [piece.name for piece in calibrated_pieces(experiment)])


def removal_pieces(experiment: Experiment, budget: Budget) -> list[Piece]:
    """Whole layers removed, as many as the rates of the form say."""
    form, measure = experiment.form, _measurements(experiment)
    calibration = form.calibration_tokens / _held_out_tokens(experiment)
    tries = sum(experiment.base.layers - done for done in range(measure.most_removed))
    greedy = len(form.targets) + tries * form.greedy_tokens / _held_out_tokens(experiment)
    return [
        Piece(INFLUENCE, _passes(experiment, len(form.targets) + calibration), measure.by_influence, (ORIGINAL,)),
        Piece(GREEDY, _passes(experiment, greedy), functools.partial(measure.greedily, budget), (ORIGINAL,)),
    ]


def retargeted_pieces(experiment: Experiment, runs: Sequence[TrainingRun]) -> list[Piece]:
    """Trained routers at the form's other rates, by thresholds alone.

    Args:
        experiment: Where.
        runs: Those of them that are routed and kept at the original's depth count.
    """
    measure, calibration = _measurements(experiment), experiment.form.calibration_tokens / _held_out_tokens(experiment)
    return [
        Piece(
            f"{RETARGETED}{run.name}-{target:.2f}",
            _passes(experiment, 1 + 3 * calibration),
            functools.partial(measure.retargeted, run.name, target),
            (run.name,),
        )
        for run in runs
        if run.kind == "routed" and run.kept
        for target in experiment.form.targets
        if target != run.target
    ]


def as_asked_pieces(experiment: Experiment, runs: Sequence[TrainingRun]) -> list[Piece]:
    """Runs that skip, and what skips as much, at the rate that was asked for: on the domains, and on watched text.

    What needs no training is the same for all runs of a rate, and is measured once. A model that nothing else needs is
    removed behind its comparison.
    """
    measure, pieces = _measurements(experiment), []
    more = 1 + sum(map(len, experiment.watched.values())) / sum(map(len, experiment.windows.values()))
    for run in runs:
        if not run.compared or run.target is None:
            continue
        untrained = f"{UNTRAINED}{run.target:.2f}"
        pieces += [
            Piece(
                untrained,
                _as_before(experiment, UNTRAINED, 7 * more),
                functools.partial(measure.untrained, run.target),
                (ORIGINAL,),
            ),
            Piece(
                f"{AS_ASKED}{run.name}",
                _as_before(experiment, AS_ASKED, 6 * more),
                functools.partial(measure.as_asked, run.name, run.target),
                (untrained, run.name),
                (lambda: None) if run.kept else functools.partial(experiment.results.remove_model, run.name),
            ),
        ]
    return pieces


def compared_as_asked(results: Results, values: Mapping[str, Any], text: str) -> dict[str, dict[str, Any]]:
    """Perplexity and rate on all of a text: of the `trained` routers, and of what they are compared with.

    Args:
        results: Hold what needs no training.
        values: Of a run's comparison.
        text: One of `TEXTS`.
    """
    found = {**results[f"{UNTRAINED}{values['target']:.2f}"][text], **values[text]}
    return {way: found[way]["all"] for way in ("trained", *WAYS)}


def as_many_pieces(experiment: Experiment, routed: Sequence[str]) -> list[Piece]:
    """What skips as much as routers do.

    Args:
        experiment: Where.
        routed: The results of routed models.
    """
    measure, seconds = _measurements(experiment), _as_before(experiment, BASELINES, 8)
    return [
        Piece(f"{BASELINES}{name}", seconds, functools.partial(measure.baselines, name), (ORIGINAL, name))
        for name in routed
    ]


@functools.lru_cache(maxsize=1)
def _measurements(experiment: Experiment) -> _Measurements:
    """One for all pieces: it holds the fine-tuned original."""
    return _Measurements(experiment)


def _held_out_tokens(experiment: Experiment) -> int:
    return len(DOMAINS) * experiment.form.held_out_tokens


def _as_before(experiment: Experiment, prefix: str, passes: float) -> Callable[[], float]:
    """What such pieces took so far, once it is known: models are made too, and other processes train beside it."""

    def seconds() -> float:
        taken = [values["seconds"] for values in experiment.results.found(prefix).values()]
        return statistics.median(taken) if taken else _passes(experiment, passes)()

    return seconds


def _passes(experiment: Experiment, count: float) -> Callable[[], float]:
    """How long it takes to run the original over all held-out text so many times, and something to spare."""
    return lambda: 1.5 * count * pass_seconds(experiment)


class _Measurements:
    """On the fine-tuned original."""

    def __init__(self, experiment: Experiment) -> None:
        self._at = experiment
        self._removed = {target: round((1 - target) * experiment.base.layers) for target in experiment.form.targets}

    @property
    def most_removed(self) -> int:
        return max(self._removed.values())

    def calibrated(self, target: float) -> dict[str, Any]:
        routers = self._at.calibrated(ORIGINAL, self._dense, target)
        return {"target": target, **self._at.measured(with_routers(self._dense, routers))}

    def retargeted(self, name: str, target: float) -> dict[str, Any]:
        model = self._at.placed(saved_model(self._at.results.model(name)))
        layers, routed = model.config.num_hidden_layers, model.config.routed_layers
        rate = 1 - (1 - target) * layers / len(routed)  # of the layers that have thresholds to move
        text = self._at.calibration[:: self._every].to(self._at.device)
        shift = shift_thresholds(model, lambda: sequence_scores(model, text), rate)
        return {"target": target, "of": name, "rate_of_routed": dataclasses.asdict(shift), **self._at.measured(model)}

    def untrained(self, target: float) -> dict[str, Any]:
        layers = self._at.base.layers
        skipped = (1 - target) * layers
        rates = {
            "static": static_rates(self._order, skipped),
            "random, every layer": dict.fromkeys(range(layers), target),
        }
        return {
            "target": target,
            **{
                text: {
                    **{way: self._at.measured(*self._at_random(by_layer), windows) for way, by_layer in rates.items()},
                    "calibrated": self._calibrated_at(target, skipped, windows),
                }
                for text, windows in self._texts.items()
            },
        }

    def as_asked(self, name: str, target: float) -> dict[str, Any]:
        if "diverged" in self._at.results[name]:
            return {"of": name, "target": target, "diverged": True}
        model = self._at.placed(saved_model(self._at.results.model(name)))
        skipped = (1 - target) * self._at.base.layers
        found = {}
        for text, windows in self._texts.items():
            own = self._moved(model, skipped, windows)
            same = self._at.measured(*self._at_random(_rates_by_layer(own["domains"])), windows)
            found[text] = {"trained": own, "random, same layers": same}
        return {"of": name, "target": target, **found}

    @property
    def _texts(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return dict(zip(TEXTS, (self._at.windows, self._at.watched), strict=True))

    def baselines(self, name: str) -> dict[str, Any]:
        found = self._at.results[name]
        if "diverged" in found:
            return {"of": name, "diverged": True}
        layers = self._at.base.layers
        skipped = (1 - found["all"]["active"]) * layers
        rates = {
            "static": static_rates(self._order, skipped),
            "random, same layers": _rates_by_layer(found["domains"]),
            "random, every layer": dict.fromkeys(range(layers), 1 - skipped / layers),
        }
        measured = {way: self._at.measured(*self._at_random(by_layer)) for way, by_layer in rates.items()}
        if not name.startswith(CALIBRATED):
            measured["calibrated"] = self._calibrated_at(found["target"], skipped, self._at.windows)
        return {"of": name, "removed_mlps": self._order[: int(skipped)], **measured}

    def _calibrated_at(self, target: float, skipped: float, windows: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Calibrated routers that skip so many MLPs on the text they are measured on."""
        routers = self._at.calibrated(ORIGINAL, self._dense, target)
        model = with_routers(self._dense, {layer: router.copy() for layer, router in routers.items()})
        return self._moved(model, skipped, windows)

    def _moved(self, model: LlamaDloForCausalLM, skipped: float, windows: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Routers whose thresholds are moved so that they skip so many MLPs on the text they are measured on."""
        text = torch.cat([*windows.values()]).to(self._at.device)
        rate = 1 - skipped / len(model.config.routed_layers)
        shift_thresholds(model, lambda: sequence_scores(model, text), max(0.0, rate))
        return self._at.measured(model, windows=windows)

    def by_influence(self) -> dict[str, Any]:
        return self._without(by_similarity(self._dense, self._at.calibration[:: self._every], "layer"))

    def greedily(self, budget: Budget) -> dict[str, Any] | None:
        windows = self._at.calibration[: max(1, self._at.form.greedy_tokens // self._at.form.sequence)]
        order = greedily(self._dense, windows.to(self._at.device), self.most_removed, budget.is_over)
        return self._without(order) if len(order) == self.most_removed else None

    def _without(self, order: list[int]) -> dict[str, Any]:
        rates = {
            f"{target:.2f}": self._at.measured(without_layers(self._dense, order[:count]))
            for target, count in self._removed.items()
        }
        return {"order": order[: self.most_removed], "layers": self._at.base.layers, "removed": self._removed, **rates}

    def _at_random(self, rates: Mapping[int, float]) -> tuple[LlamaDloForCausalLM, DecideShape]:
        hidden = self._at.base.config["hidden_size"]
        routed = with_routers(self._dense, {layer: torch.zeros(1, hidden).numpy() for layer in rates})
        generator = torch.Generator().manual_seed(0)

        def decide(shape: torch.Size) -> dict[int, torch.Tensor]:
            # On the CPU, so that every device skips the same tokens.
            return {
                layer: (torch.rand(shape, generator=generator) < rate).to(self._at.device)
                for layer, rate in rates.items()
            }

        return routed, decide

    @functools.cached_property
    def _dense(self) -> LlamaDloForCausalLM:
        """Nothing that is measured changes its weights, which all of it shares."""
        return self._at.placed(saved_model(self._at.results.model(ORIGINAL)))

    @functools.cached_property
    def _order(self) -> list[int]:
        return by_similarity(self._dense, self._at.calibration[:: self._every], "mlp")

    @property
    def _every(self) -> int:
        """Means need fewer tokens than routers: one window in so many."""
        return 1 if len(self._at.calibration) < 16 else 8


def _rates_by_layer(domains: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    """Mean over domains, which have as many tokens each."""
    layers = next(iter(domains.values()))["active_by_layer"]
    return {
        int(layer): sum(values["active_by_layer"][layer] for values in domains.values()) / len(domains)
        for layer in layers
    }
