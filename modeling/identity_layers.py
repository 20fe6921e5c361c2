"""Which layers change nothing: their blocks' last projections are all zeros."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, RoutingKind


def identity_layers(model: PreTrainedModel, routing: RoutingKind) -> Iterator[int]:
    """Layers of which what can be skipped adds exactly nothing, as in an untrained zero_out layer.

    Args:
        model: A causal Llama, transformers' or ours.
        routing: What can be skipped.
    """
    for index, layer in enumerate(model.model.layers):
        ends = {"self_attn": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}
        if all(adds_nothing(ends[block]) for block in ROUTED_BLOCKS[routing]):
            yield index


def adds_nothing(projection: nn.Linear) -> bool:
    """Whether a branch's last projection is all zeros, bias included."""
    # The first row settles it for all but the zero matrices.
    zero = not projection.weight[0].any() and not projection.weight.any()
    return zero and (projection.bias is None or not projection.bias.any())
