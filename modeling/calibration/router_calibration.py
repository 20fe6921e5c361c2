"""Fits routers to a frozen model from forward passes over real text.

Layer by layer, so that memory does not grow with depth. A first pass over a part of the text measures how similar each
MLP (or whole layer, where tokens are to skip that) leaves the residual stream and shares the skips out among the
layers; a second pass fits each layer's router on the stream as it arrives there, that is, with the layers below already
skipping. Fitted on the undisturbed stream instead, routers meet inputs they never saw and lose most of their quality.

What calibration cannot do is make the model robust to being skipped: that is what training with the routers in place is
for (DLO, arXiv 2407.11030, is part of supervised fine-tuning). On SmolLM2-135M perplexity rises by a quarter
at 90 % active, by four fifths at 80 % and tenfold at 60 %; benchmarks/calibration_quality.py measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.modeling.calibration.layer_stream import LayerStream
from dlo_export.modeling.calibration.router_fit import fit_router
from dlo_export.modeling.calibration.skip_labels import (
    LABELS,
    is_massive,
    label_rates,
    label_weights,
    lowest,
    protected_similarity,
)
from dlo_export.modeling.identity_layers import identity_layers

CalibrationProgress = Callable[[int, int], None]
"""Called with (layers run, layers to run)."""


class CalibrationError(InputError):
    """The model or the settings leave nothing to calibrate."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How routers are fitted.

    Attributes:
        target_active: Share of tokens that do not skip, averaged over the layers that are not identities.
        routing: What tokens skip.
        labels: ``cos-global`` shares skips out over all layers by similarity, ``cos`` gives each layer the same,
            which costs far more: some layers, often the first, can spare nothing.
        layers: Layers to route; None for all. Identity layers are routed in any case.
        min_skipped: A layer that would skip a smaller share than this gets no router: it would cost more than it saves.
        share_every: The first pass, which shares the skips out, takes one sequence in this many.
    """

    target_active: float = 0.9
    routing: RoutingKind = "mlp"
    labels: str = "cos-global"
    layers: tuple[int, ...] | None = None
    min_skipped: float = 0.01
    share_every: int = 8

    def __post_init__(self) -> None:
        """Raises CalibrationError for values out of range."""
        if not 0 < self.target_active < 1:
            raise CalibrationError(
                f"calibration: target_active is {self.target_active}, expected a share between 0 and 1",
                hint="0.9 is the authors' default",
            )
        if self.labels not in LABELS:
            raise CalibrationError(
                f"calibration: labels is {self.labels!r}, expected one of {', '.join(LABELS)}",
                hint="cos-global is the authors' default",
            )


@dataclass(frozen=True)
class CalibratedRouters:
    """Fitted routers.

    Attributes:
        num_layers: Layers of the model.
        routers: By layer, float32 [1, hidden]; all zeros, so always skipping, for identity layers.
        label_rates: For the fitted layers, the share of calibration tokens labelled active.
        agreement: For the fitted layers, the share of calibration tokens on which router and label agree.
        identity_layers: Layers of which what can be skipped adds exactly nothing.
        thresholds: By routed layer, the score an active token exceeds, where it is not one half.
    """

    num_layers: int
    routers: dict[int, np.ndarray]
    label_rates: dict[int, float]
    agreement: dict[int, float]
    identity_layers: tuple[int, ...]
    thresholds: dict[int, float] = field(default_factory=dict)

    @property
    def choosing(self) -> tuple[int, ...]:
        """Layers whose routers have a choice to make: those of identity layers skip everything."""
        return tuple(layer for layer in self.routers if layer not in self.identity_layers)

    def rate_of_choosing(self, target_active: float) -> float:
        """The active rate of the choosing layers that a target over all but the identity layers comes to.

        Args:
            target_active: As in `CalibrationSettings`; a layer without router is always active.

        Raises:
            CalibrationError: The target is out of their reach.
        """
        skipped = (1 - target_active) * (self.num_layers - len(self.identity_layers))
        if not 0 < skipped < len(self.choosing):
            raise CalibrationError(
                f"calibration: {target_active:.0%} active would skip {skipped:.1f} layers' MLPs, but "
                f"{len(self.choosing)} layers have routers to skip them",
                hint="ask for a higher rate, or route more layers",
            )
        return 1 - skipped / len(self.choosing)


@torch.no_grad()
def calibrate_routers(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    settings: CalibrationSettings | None = None,
    *,
    progress: CalibrationProgress | None = None,
) -> CalibratedRouters:
    """Fits the routers of a causal Llama, transformers' or ours, whose weights stay as they are.

    Routers the model has already are left out of account and replaced.

    Args:
        model: In evaluation mode.
        sequences: Text, int64 [sequences, length], without padding, where the model is.
        settings: The defaults if None.
        progress: Called after every layer of both passes.

    Raises:
        CalibrationError: No layer can be routed, or the target is out of their reach; or the model's numbers run out of
            float32.
    """
    settings = settings or CalibrationSettings()
    num_layers = len(model.model.layers)
    identities = tuple(identity_layers(model, settings.routing))
    candidates = _candidates(settings, num_layers, identities)
    steps = _Steps(2 * num_layers, progress)
    skipped_layers = (1 - settings.target_active) * (num_layers - len(identities))
    sample = sequences[:: settings.share_every]
    # First pass, on a sample: how little each layer changes decides how many of the skips it gets.
    rates = _share_skips(_similarities(model, sample, candidates, settings, steps), settings, skipped_layers)

    routers = {layer: torch.zeros(model.config.hidden_size) for layer in identities}
    agreement: dict[int, float] = {}
    # Second pass, layer by layer: each router is fitted to the stream that the routers before it leave, as in use.
    stream = LayerStream(model, sequences, settings.routing)
    for layer in range(max(rates) + 1):
        output = stream.run_layer(layer)
        active = None
        if layer in rates:
            inputs = stream.hidden_states.reshape(-1, stream.hidden_states.shape[-1]).float()
            _check_lengths(layer, inputs)
            massive = is_massive(inputs)
            labels = lowest(protected_similarity(output.similarity, massive), rates[layer])
            routers[layer] = fit_router(inputs, labels, label_weights(labels, output.relative_size, massive))
            active = inputs @ routers[layer] > 0
            agreement[layer] = float((active == labels).float().mean())
        stream.advance(layer, output, active)
        steps.done()
    steps.finish()
    return CalibratedRouters(
        num_layers=num_layers,
        routers={layer: routers[layer].reshape(1, -1).cpu().numpy() for layer in sorted(routers)},
        label_rates=rates,
        agreement=agreement,
        identity_layers=identities,
    )


class _Steps:
    """Counts layers for the progress callback."""

    def __init__(self, total: int, progress: CalibrationProgress | None) -> None:
        self._count, self._total, self._progress = 0, total, progress

    def done(self) -> None:
        self._count += 1
        if self._progress is not None:
            self._progress(self._count, self._total)

    def finish(self) -> None:
        """Layers behind the last routed one need not run."""
        if self._progress is not None and self._count < self._total:
            self._progress(self._total, self._total)


def _candidates(settings: CalibrationSettings, num_layers: int, identities: tuple[int, ...]) -> tuple[int, ...]:
    """The layers to fit routers for; checks that so many skips find room in them."""
    chosen = range(num_layers) if settings.layers is None else settings.layers
    if unknown := [layer for layer in chosen if not 0 <= layer < num_layers]:
        raise CalibrationError(
            f"calibration: layers {unknown} do not exist, expected 0 to {num_layers - 1}",
            hint="layers count from 0",
        )
    candidates = tuple(sorted(set(chosen) - set(identities)))
    skipped = (1 - settings.target_active) * (num_layers - len(identities))
    if not skipped < len(candidates):
        raise CalibrationError(
            f"calibration: {settings.target_active:.0%} active would skip as much as {skipped:.1f} layers have, but "
            f"only {len(candidates)} layers are to be routed (identity layers: {list(identities)})",
            hint="route more layers or raise the target",
        )
    return candidates


def _similarities(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    layers: tuple[int, ...],
    settings: CalibrationSettings,
    steps: _Steps,
) -> dict[int, torch.Tensor]:
    """By layer, the similarities of the undisturbed stream, float32 [tokens], massive tokens ranked last."""
    similarities = {}
    stream = LayerStream(model, sequences, settings.routing)
    for layer in range(len(model.model.layers)):
        output = stream.run_layer(layer)
        if layer in layers:
            inputs = stream.hidden_states.reshape(-1, stream.hidden_states.shape[-1])
            _check_lengths(layer, inputs)
            similarities[layer] = protected_similarity(output.similarity, is_massive(inputs))
        stream.advance(layer, output)
        steps.done()
    return similarities


def _check_lengths(layer: int, inputs: torch.Tensor) -> None:
    """Refuses tokens that no direction can be told of: not finite, or so long that float32 cannot hold the length."""
    if not bool(inputs.float().norm(dim=-1).isfinite().all()):
        raise CalibrationError(
            f"calibration: layer {layer}: the residual stream that arrives there is not finite, or longer than float32 "
            f"can tell (it reaches {float(inputs.abs().max()):.3g})",
            hint="a weight of the model is damaged: fetch it again",
        )


def _share_skips(
    similarities: dict[int, torch.Tensor], settings: CalibrationSettings, skipped_layers: float
) -> dict[int, float]:
    """Active rates of the layers that get a router. Where skips are too few to pay, the other layers take them."""
    while True:
        rates = label_rates(similarities, settings.labels, skipped_layers)
        idle = [layer for layer, rate in rates.items() if 1 - rate < settings.min_skipped]
        if not idle or len(similarities) - len(idle) <= skipped_layers:
            return rates
        similarities = {layer: values for layer, values in similarities.items() if layer not in idle}
