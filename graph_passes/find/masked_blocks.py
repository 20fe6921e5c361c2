"""The blocks of a layer that its router switches, in masked form."""

from __future__ import annotations

from collections.abc import Iterator

from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.masked_attention import MaskedAttention, match_masked_attention
from dlo_export.graph_passes.find.masked_branch import Mismatch
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp, match_masked_mlp
from dlo_export.graph_passes.find.residual_stream import ResidualBlock

MaskedBlock = MaskedMlp | MaskedAttention


def match_masked_blocks(layer: DecoderLayer) -> Iterator[tuple[ResidualBlock, MaskedBlock | Mismatch]]:
    """Match what a router of this layer would switch, in the order of the stream.

    Yields:
        The blocks that have a mask, attention also where a state says who was active; the MLP where none has.
    """
    attention, mlp = match_masked_attention(layer), match_masked_mlp(layer)
    attention_is_switched = layer.past_active is not None or has_mask(attention)
    if attention_is_switched:
        yield layer.attention, attention
    if has_mask(mlp) or not attention_is_switched:
        yield layer.mlp, mlp


def has_mask(match: MaskedBlock | Mismatch) -> bool:
    """Whether a block is masked, be it in another form than the canonical one."""
    return not isinstance(match, Mismatch) or match.masked
