"""Runs a Llama layer by layer over many sequences, keeping one layer's residual stream in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dlo_export.modeling.llama_dlo import adds_nothing

_SEQUENCES_AT_ONCE = 8


@dataclass(frozen=True)
class LayerOutput:
    """What a layer computes for every token of the stream.

    Attributes:
        attended: The residual stream after attention, [sequences, length, hidden].
        branch: What the MLP adds to it, of the same shape.
    """

    attended: torch.Tensor
    branch: torch.Tensor

    @property
    def similarity(self) -> torch.Tensor:
        """Cosine of the stream before and after the MLP, float32 [tokens] (DLO, arXiv 2407.11030)."""
        return torch.cat(
            [
                torch.cosine_similarity(before.float(), before.float() + added.float(), dim=-1)
                for before, added in zip(self.attended, self.branch, strict=True)
            ]
        )

    @property
    def relative_size(self) -> torch.Tensor:
        """Length of what the MLP adds over that of the stream it is added to, float32 [tokens]."""
        added: torch.Tensor = self.branch.float().norm(dim=-1)
        return added.div(self.attended.float().norm(dim=-1)).reshape(-1)


class LayerStream:
    """The residual stream of token sequences on its way through a model's layers.

    Memory is three times tokens × hidden, whatever the depth. Works on transformers' Llama and on ours.

    Args:
        model: A causal Llama.
        sequences: int64 [sequences, length], without padding.

    Attributes:
        hidden_states: The next layer's input, [sequences, length, hidden].
    """

    def __init__(self, model: PreTrainedModel, sequences: torch.Tensor) -> None:
        self._decoder = model.model
        self.hidden_states: torch.Tensor = self._decoder.embed_tokens(sequences)
        self._position_ids = torch.arange(sequences.shape[1]).unsqueeze(0)
        self._position_embeddings = self._decoder.rotary_emb(self.hidden_states[:1], position_ids=self._position_ids)

    def run_layer(self, index: int) -> LayerOutput:
        """Computes a layer for all sequences, the MLP for every token. The stream stays where it is."""
        layer = self._decoder.layers[index]
        attended, branch = self.hidden_states.clone(), torch.zeros_like(self.hidden_states)
        # What zero_out layers add need not be computed.
        attends, adds = not adds_nothing(layer.self_attn.o_proj), not adds_nothing(layer.mlp.down_proj)
        for start in range(0, len(self.hidden_states), _SEQUENCES_AT_ONCE):
            batch = slice(start, start + _SEQUENCES_AT_ONCE)
            if attends:
                attended[batch] += self._attention(layer, self.hidden_states[batch])
            if adds:
                branch[batch] = layer.mlp(layer.post_attention_layernorm(attended[batch]))
        return LayerOutput(attended, branch)

    def advance(self, output: LayerOutput, active: torch.Tensor | None = None) -> None:
        """Moves the stream past a layer, adding the MLP's branch to the active tokens (bool [tokens]; None for all)."""
        if active is None:
            self.hidden_states = output.attended.add_(output.branch)
        else:
            added = output.branch.masked_fill_(~active.reshape(*output.branch.shape[:2], 1), 0)
            self.hidden_states = output.attended.add_(added)

    def _attention(self, layer: LlamaDecoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
        mask = create_causal_mask(
            config=self._decoder.config,
            inputs_embeds=hidden_states,
            attention_mask=None,
            past_key_values=None,
            position_ids=self._position_ids,
        )
        branch: torch.Tensor
        branch, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states),
            attention_mask=mask,
            position_ids=self._position_ids,
            position_embeddings=self._position_embeddings,
        )
        return branch
