"""Measures a model on text: perplexity, and how many tokens each router lets through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.checkpoints.llama_layer import parse_router, router_name
from dlo_export.checkpoints.model_types import KV_KEY, RoutingKind, family_of, routed_type
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM, model_class_of
from dlo_export.modeling.perplexity import perplexity, score_hidden_states
from dlo_export.modeling.routing import is_active

Decide = Callable[[int, torch.Size], Mapping[int, torch.Tensor]]
"""Decisions in place of the routers': of the number of a batch and its shape [batch, sequence], bools by layer."""

_SEQUENCES_AT_ONCE = 4


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        perplexity: exp of the mean loss of every token but each sequence's first.
        active_rates: By routed layer, the share of tokens that did not skip.
        tokens: Tokens the model read.
    """

    perplexity: float
    active_rates: dict[int, float]
    tokens: int


def with_routers(
    model: PreTrainedModel,
    routers: Mapping[int, np.ndarray],
    routing: RoutingKind = "mlp",
) -> LlamaDloForCausalLM:
    """The same model, sharing its weights, with these routers and no others.

    Args:
        model: transformers' Llama or ours; of another family, ours.
        routers: By layer, float32 [1, hidden].
        routing: What they let tokens skip.
    """
    num_layers = model.config.num_hidden_layers
    named = ("model_type", "architectures")
    values = {key: value for key, value in model.config.to_dict().items() if key not in (*named, THRESHOLDS, KV_KEY)}
    is_dlo = [layer in routers for layer in range(num_layers)]
    changes = routed_config(is_dlo, routing=routing)
    model_class = model_class_of(routed_type(routing, family=family_of(model.config.to_dict())))
    config = model_class.config_class(
        **{**values, **{key: value for key, value in changes.items() if key not in named}}
    )
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        routed = model_class(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if parse_router(name) is None}
    weights |= {router_name(layer): torch.from_numpy(router).to(model.device) for layer, router in routers.items()}
    routed.load_state_dict(weights, assign=True)
    routed.model.rotary_emb = model.model.rotary_emb
    routed.eval()
    return routed


@torch.no_grad()
def evaluate(model: LlamaDloForCausalLM, sequences: torch.Tensor, decide: Decide | None = None) -> Evaluation:
    """Runs the model over text as it would run at inference.

    Args:
        model: In evaluation mode.
        sequences: int64 [sequences, length], without padding, where the model is.
        decide: Decisions to try in place of the routers', for example random ones.
    """
    loss, count, active = 0.0, 0, dict.fromkeys(model.config.routed_layers, 0)
    for number, batch in enumerate(sequences.split(_SEQUENCES_AT_ONCE)):
        forced = {} if decide is None else dict(decide(number, batch.shape))
        output = model.model(batch, use_cache=False, force_active=forced)
        for layer, scores in output.router_scores.items():
            active[layer] += int(forced.get(layer, is_active(scores, model.config.threshold(layer))).sum())
        rows, targets = output.last_hidden_state[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        loss += float(score_hidden_states(model.lm_head, rows, targets, model.config.vocab_size).losses.sum())
        count += len(targets)
    rates = {layer: number / sequences.numel() for layer, number in active.items()}
    return Evaluation(perplexity(loss, count), rates, sequences.numel())
