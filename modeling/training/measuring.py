"""What text says of a model in training, and how its active rate is brought to the target in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dlo_export.modeling.calibration.rate_control import shift_thresholds
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.perplexity import score_tokens
from dlo_export.modeling.routing import is_active
from dlo_export.modeling.training.compilation import uncompiled
from dlo_export.modeling.training.packing import IGNORED, PackedDocuments, PackedSets, stacked
from dlo_export.modeling.training.reports import HeldOut, RateControl
from dlo_export.modeling.training.settings import TrainingSettings

Found = TypeVar("Found")

_RATE_TOLERANCE = 0.01  # half of what a user may expect, since held-out text is a sample


class Measuring:
    """Runs a model over text, in all processes that train it.

    Args:
        model: Routed or dense, and perhaps in shards.
        settings: Of the run.
        data: Whose held-out text is measured on.
        accelerator: Of the run.
        autocast: Makes the context in which the model runs.
        training_routing: Of `counted`, what the model is told of how training routes; nothing where nothing is routed.
    """

    def __init__(
        self,
        model: LlamaDloForCausalLM,
        settings: TrainingSettings,
        data: PackedSets,
        accelerator: Accelerator,
        *,
        autocast: Callable[[], AbstractContextManager[None]],
        training_routing: Callable[[torch.Tensor], dict[str, Any]],
    ) -> None:
        self._model = model
        self._settings = settings
        self._data = data
        self._accelerator = accelerator
        self._autocast = autocast
        self._training_routing = training_routing

    def control_rate(self) -> RateControl:
        """Shifts the thresholds where the rate is off the target: fitted on every other held-out sequence.

        The first process decides. Each runs all of the text, but their floats may differ in the last bit, and then one
        might shift, or run the model once more, where another does not.
        """
        model, target = self._model, self._settings.target
        fitted, others = self._data.fitted, self._data.not_fitted
        was_training = model.training
        model.eval()
        before = after = self._agreed(self._rate(others))
        if abs(before - target) > _RATE_TOLERANCE:
            shift_thresholds(model, lambda: self._held_out_scores(fitted), target, agreed=self._agreed)
            after = self._agreed(self._rate(others))
        model.train(was_training)
        return RateControl(target, before, after, model.config.thresholds, fitted != others)

    def _agreed(self, found: Found) -> Found:
        """What the first process has found."""
        agreed = [found]
        broadcast_object_list(agreed)
        return agreed[0]

    def _rate(self, sequences: range) -> float:
        """Mean active rate at inference over the routed layers."""
        config = self._model.config
        scores = self._held_out_scores(sequences)
        rates = [is_active(values, config.threshold(layer)).double().mean() for layer, values in scores.items()]
        return float(torch.stack(rates).mean())

    @torch.no_grad()
    def _held_out_scores(self, sequences: range) -> dict[int, torch.Tensor]:
        """Of all that is not padding. Each process runs all of the sequences: a model in shards runs in all or none."""
        scores: dict[int, list[torch.Tensor]] = {layer: [] for layer in self._model.config.routed_layers}
        for start in range(0, len(sequences), self._settings.batch):
            chosen = stacked([self._data.held_out[index] for index in sequences[start : start + self._settings.batch]])
            batch = {name: value.to(self._accelerator.device) for name, value in chosen.items() if name != "labels"}
            counted = batch.pop("counted")
            with self._autocast(), uncompiled():
                found = self._model(**batch, use_cache=False, logits_to_keep=1).router_scores
            for layer, values in scores.items():
                values.append(found[layer][counted].cpu())
        return {layer: torch.cat(values) for layer, values in scores.items()}

    @torch.no_grad()
    def measure(self, text: PackedDocuments | None = None) -> HeldOut:
        """Runs the model over text, held out unless given, routed as at inference and, beside it, as in training."""
        text = self._data.held_out if text is None else text
        model = self._model
        was_training = model.training
        model.eval()
        layers = model.config.routed_layers
        sums = torch.zeros(4 + len(layers), dtype=torch.float64, device=self._accelerator.device)
        config = model.config
        with uncompiled():
            for batch in self._batches(text):
                counted, labels = batch.pop("counted"), batch.pop("labels")
                with self._autocast():
                    outputs = model(**batch, use_cache=False)
                    loss = _summed_loss(outputs.logits, labels)
                    trained = loss
                    if layers:
                        routing = self._training_routing(counted)
                        trained = _summed_loss(model(**batch, **routing, use_cache=False).logits, labels)
                scores = outputs.router_scores
                active = [(is_active(scores[layer], config.threshold(layer)) & counted).sum() for layer in layers]
                found = [loss, trained, (labels != IGNORED).sum(), counted.sum(), *active]
                sums += torch.stack([value.double() for value in found])
        model.train(was_training)
        loss, trained, learned, tokens, *counts = self._accelerator.reduce(sums, "sum").tolist()
        rates = {layer: count / tokens for layer, count in zip(layers, counts, strict=True)}
        return HeldOut(loss / learned, trained / learned, rates)

    def _batches(self, text: PackedDocuments) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share, in as many batches as every other's: a sharded model runs in all of them or in none."""
        number, processes = len(text), self._accelerator.num_processes
        step = self._settings.batch * processes
        for start in range(self._accelerator.process_index, -(-number // step) * step, step):
            mine = [index for index in range(start, start + step, processes) if index < number]
            batch = stacked([text[index] for index in mine or [0]])
            if not mine:
                batch["labels"].fill_(IGNORED)
                batch["counted"].fill_(False)
            yield {name: value.to(self._accelerator.device) for name, value in batch.items()}


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    learned = labels[:, 1:] != IGNORED
    return score_tokens(logits[:, :-1][learned], labels[:, 1:][learned]).losses.sum()
