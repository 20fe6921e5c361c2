"""Distils routers: they learn to skip where the dense model's next tokens suffer least, and nothing else learns.

Similarity says how much an MLP turns the residual stream, not what that does to the output. Here the routers start from
similarity and are trained on what counts, by the one training loop: soft gates that harden into inference's decisions,
the divergence from the model without routing, and a penalty on the active rate that inference would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.modeling.calibration.evaluation import with_routers
from dlo_export.modeling.training.documents import TokenDocument
from dlo_export.modeling.training.packing import PackedDocuments, PackedSets
from dlo_export.modeling.training.run import train_model
from dlo_export.modeling.training.run_folder import RunFolder
from dlo_export.modeling.training.settings import TrainingSettings

_LOGITS = 2.0  # of the median token at most as training starts: a score of 0.88, or of 0.12
_HARD_SHARE = 0.25  # of the steps, at the end, in which decisions are inference's


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    """How routers are distilled.

    Attributes:
        steps: Optimiser steps.
        learning_rate: How far a step may move a weight, as a share of its router's root mean square.
        batch: Sequences of a step.
        seed: Of the order of the text.
    """

    steps: int = 24
    learning_rate: float = 0.05
    batch: int = 4
    seed: int = 0


def distilled_routers(
    model: PreTrainedModel,
    routers: Mapping[int, np.ndarray],
    sequences: torch.Tensor,
    rate: float,
    settings: DistillationSettings,
    *,
    routing: RoutingKind = "mlp",
    held_out: torch.Tensor,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[int, np.ndarray]:
    """Trains routers on a frozen model.

    Args:
        model: A causal Llama in float32, transformers' or ours, without routers or with others; left as it is.
        routers: By layer, float32 [1, hidden]: what training starts from.
        sequences: Text to learn from, int64 [sequences, length], without padding, where the model is.
        rate: Wanted share of active tokens, over these layers.
        settings: Of the training.
        routing: What they let tokens skip.
        held_out: Text to watch it on, likewise.
        progress: Called with (steps done, steps).

    Raises:
        TrainingDivergedError: A loss or gradient is not finite.
        MachineError: The temporary folder cannot be written to.
    """
    routed = with_routers(model, _unsaturated(model, routers, routing, sequences[: settings.batch]), routing)
    training = TrainingSettings(
        mode="routers",
        target=rate,
        anneal_steps=0,
        labels="self",
        selection="annealed",
        soft_steps=round(settings.steps * (1 - _HARD_SHARE)),
        language_weight=0.0,
        distill_weight=1.0,
        skip_weight=0.0,
        exact_rate=False,
        max_steps=settings.steps,
        batch=settings.batch,
        sequence=sequences.shape[1],
        router_learning_rate=settings.learning_rate,
        relative_router_rate=True,
        layer_wise=False,
        eval_every=settings.steps,
        save_every=settings.steps,
        seed=settings.seed,
        device=str(model.device),
    )
    with scratch_folder() as folder:
        train_model(
            routed,
            training,
            PackedSets(_packed(sequences), _packed(held_out)),
            folder=RunFolder(folder, resumable=False),
            description={"settings": dataclasses.asdict(training)},
            report=lambda step: progress(step.step, step.steps),
        )
    state = {layer: routed.model.router(layer) for layer in routers}
    return {layer: router.weight.detach().cpu().numpy() for layer, router in state.items() if router is not None}


@torch.no_grad()
def _unsaturated(
    model: PreTrainedModel, routers: Mapping[int, np.ndarray], routing: RoutingKind, sequences: torch.Tensor
) -> dict[int, np.ndarray]:
    """The routers, scaled down where scores are all but 0 or 1: the same decisions, with a gradient to learn from."""
    routed = with_routers(model, routers, routing)
    streams = routed.model(sequences, use_cache=False, output_hidden_states=True).hidden_states
    scaled = {}
    for layer, router in routers.items():
        size = float(
            (streams[layer].float() @ torch.from_numpy(router).flatten().to(streams[layer].device)).abs().median()
        )
        scaled[layer] = router * np.float32(min(1.0, _LOGITS / size) if size else 1.0)
    return scaled


def _packed(sequences: torch.Tensor) -> PackedDocuments:
    """Sequences as documents of their own, every token of which is learned."""
    documents = [
        TokenDocument(f"sequence {number}", tokens, np.ones(len(tokens), bool))
        for number, tokens in enumerate(sequences.cpu().numpy())
    ]
    return PackedDocuments(documents, sequences.shape[1])
