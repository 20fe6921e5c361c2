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
        The attention block where the layer has a state that says who was active, and the MLP block.
    """
    if layer.past_active is not None:
        yield layer.attention, match_masked_attention(layer)
    yield layer.mlp, match_masked_mlp(layer)
