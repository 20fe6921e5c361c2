"""Runs a Llama layer by layer over many sequences, keeping one layer's residual stream in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, RoutingKind, leaves_keys
from dlo_export.modeling.active_attention import attend_among_active
from dlo_export.modeling.active_tokens import ActiveTokens
from dlo_export.modeling.family_modules import block_branch, block_input
from dlo_export.modeling.identity_layers import adds_nothing

_SEQUENCES_AT_ONCE = 8


@dataclass(frozen=True)
class LayerOutput:
    """What a layer computes for every token of the stream where nobody skips it.

    Attributes:
        kept: What a token keeps that skips: the stream after attention where that is not skipped, else the layer's
            input; [sequences, length, hidden].
        added: What is added to it for a token that does not, of the same shape. An MLP that nobody skips comes behind.
    """

    kept: torch.Tensor
    added: torch.Tensor

    @property
    def similarity(self) -> torch.Tensor:
        """Cosine of the stream with and without what can be skipped, float32 [tokens] (DLO, arXiv 2407.11030)."""
        return torch.cat(
            [
                torch.cosine_similarity(before.float(), before.float() + added.float(), dim=-1)
                for before, added in zip(self.kept, self.added, strict=True)
            ]
        )

    @property
    def relative_size(self) -> torch.Tensor:
        """Length of what is added over that of the stream it is added to, float32 [tokens]."""
        added: torch.Tensor = self.added.float().norm(dim=-1)
        return added.div(self.kept.float().norm(dim=-1)).reshape(-1)


class LayerStream:
    """The residual stream of token sequences on its way through a model's layers.

    Memory is three times tokens × hidden, whatever the depth. Works on transformers' Llama and on ours.

    Args:
        model: A causal Llama.
        sequences: int64 [sequences, length], without padding; moved to where the model is.
        routing: What tokens skip.

    Attributes:
        hidden_states: The next layer's input, [sequences, length, hidden].
    """

    def __init__(self, model: PreTrainedModel, sequences: torch.Tensor, routing: RoutingKind = "mlp") -> None:
        self._decoder = model.model
        self._routing = routing
        sequences = sequences.to(model.device)
        self.hidden_states: torch.Tensor = self._decoder.embed_tokens(sequences)
        self._position_ids = torch.arange(sequences.shape[1], device=sequences.device).unsqueeze(0)
        self._position_embeddings = self._decoder.rotary_emb(self.hidden_states[:1], position_ids=self._position_ids)

    def run_layer(self, index: int) -> LayerOutput:
        """Computes a layer for all sequences, all of it for every token. The stream stays where it is."""
        layer, skipped = self._decoder.layers[index], ROUTED_BLOCKS[self._routing]
        kept = self.hidden_states if "self_attn" in skipped else torch.empty_like(self.hidden_states)
        added = torch.zeros_like(self.hidden_states)
        # What zero_out layers add need not be computed.
        attends, adds = not adds_nothing(layer.self_attn.o_proj), not adds_nothing(layer.mlp.down_proj)
        for batch in self._batches():
            attended = self.hidden_states[batch]
            if attends:
                attention = self._attention(layer, attended)
                attended = attended + attention
                if "self_attn" in skipped:
                    added[batch] += attention
            if adds and "mlp" in skipped:
                added[batch] += _mlp_branch(layer, attended)
            if "self_attn" not in skipped:
                kept[batch] = attended
        return LayerOutput(kept, added)

    def advance(self, index: int, output: LayerOutput, active: torch.Tensor | None = None) -> None:
        """Moves the stream past a layer.

        Args:
            index: Of the layer.
            output: What `run_layer` gave for it; used up.
            active: bool [tokens], who does not skip it; None for all.
        """
        layer = self._decoder.layers[index]
        if active is None:
            self.hidden_states = output.added.add_(output.kept)
        elif leaves_keys(self._routing):
            added = output.added.masked_fill_(~active.reshape(*output.added.shape[:2], 1), 0)
            self.hidden_states = output.kept.add_(added)
        else:
            # Those that stay see each other only, so what they get is not what `run_layer` computed.
            self._run_active(layer, active.reshape(self.hidden_states.shape[:2]))
        if "mlp" not in ROUTED_BLOCKS[self._routing] and not adds_nothing(layer.mlp.down_proj):
            for batch in self._batches():
                self.hidden_states[batch] += _mlp_branch(layer, self.hidden_states[batch])

    def _batches(self) -> Iterator[slice]:
        """Of sequences, as many as are computed at once."""
        for start in range(0, len(self.hidden_states), _SEQUENCES_AT_ONCE):
            yield slice(start, start + _SEQUENCES_AT_ONCE)

    def _run_active(self, layer: LlamaDecoderLayer, active: torch.Tensor) -> None:
        for batch in self._batches():
            tokens, stream = ActiveTokens(active[batch]), self.hidden_states[batch]
            mask = self._causal_mask(stream, as_numbers=True)
            assert isinstance(mask, torch.Tensor), "sdpa and eager attention take numbers"
            rows = tokens.gather(stream)
            attended = attend_among_active(
                layer.self_attn,
                block_input(layer, "self_attn", rows),
                tokens,
                active[batch],
                attention_mask=mask,
                position_embeddings=self._position_embeddings,
            )
            rows = rows + block_branch(layer, "self_attn", attended)
            if "mlp" in ROUTED_BLOCKS[self._routing]:
                rows = rows + _mlp_branch(layer, rows)
            self.hidden_states[batch] = tokens.put(rows, stream)

    def _attention(self, layer: LlamaDecoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor
        attended, _ = layer.self_attn(
            hidden_states=block_input(layer, "self_attn", hidden_states),
            attention_mask=self._causal_mask(hidden_states),
            position_ids=self._position_ids,
            position_embeddings=self._position_embeddings,
        )
        return block_branch(layer, "self_attn", attended)

    def _causal_mask(self, hidden_states: torch.Tensor, *, as_numbers: bool = False) -> Any:
        """The mask of transformers: of numbers, or whatever its attention takes for causal order."""
        return create_causal_mask(
            config=self._decoder.config,
            inputs_embeds=hidden_states,
            attention_mask=None,
            past_key_values=None,
            position_ids=self._position_ids,
            allow_is_causal_skip=not as_numbers,
        )


def _mlp_branch(layer: LlamaDecoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    return block_branch(layer, "mlp", layer.mlp(block_input(layer, "mlp", hidden_states)))
