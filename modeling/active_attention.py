"""Attention among the active tokens of a layer that the others skip whole.

A skipped token asks nothing and answers nothing: its keys and values are zeros in the cache and masked everywhere.
Positions and causal order are those of all tokens (DLO, arXiv 2407.11030).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from dlo_export.modeling.active_cache import active_tokens_of
from dlo_export.modeling.active_tokens import TokenRows


def attend_among_active(
    attention: LlamaAttention,
    rows: torch.Tensor,
    tokens: TokenRows,
    active: torch.Tensor,
    *,
    attention_mask: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The family's attention, its projections for some tokens only, its keys those of active tokens.

    Args:
        attention: Whose weights are used: a Llama's, or one of `family_modules`.
        rows: The normalised stream of `tokens`, [n, hidden].
        tokens: Whom to attend for: the active ones, or more of them, each of which then sees itself as well.
        active: bool [batch, sequence], this step's tokens that others may attend to.
        attention_mask: What could be seen if all were active: bool, or to be added to the scores;
            [batch or 1, 1, sequence, past + sequence].
        position_embeddings: Cosines and sines of the rotary embedding, of all tokens' own positions.
        past_key_values: Made by `add_active_state`; gets the step's keys and values, and which tokens were active.
        kwargs: Passed on to transformers' attention function.

    Returns:
        What attention adds to the rows, [n, hidden].
    """
    heads = (*active.shape, -1, attention.head_dim)
    projected = (
        _head_normed(attention.q_proj(rows), attention, "q_norm"),
        _head_normed(attention.k_proj(rows), attention, "k_norm"),
        attention.v_proj(rows),
    )
    query, key, value = (tokens.spread(each).view(heads).transpose(1, 2) for each in projected)
    # SmolLM3 has layers that do not rotate.
    if getattr(attention, "use_rope", True):
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    # The cache gets its entry even where nobody is active: it must stay as long as the sequence.
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx, active)
        active = active_tokens_of(past_key_values, attention.layer_idx)
    if not len(rows):
        return rows
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    attended, _ = attend(
        attention,
        query,
        key,
        value,
        _mask_of_active(attention_mask, active, query.shape[2]),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    added: torch.Tensor = attention.o_proj(tokens.gather(attended.flatten(2)))
    return added


def _head_normed(rows: torch.Tensor, attention: nn.Module, name: str) -> torch.Tensor:
    """Queries or keys [n, heads · head_dim], each head normalised by itself in families that do so (Qwen3)."""
    norm = getattr(attention, name, None)
    return rows if norm is None else norm(rows.unflatten(-1, (-1, attention.head_dim))).flatten(-2)


def _mask_of_active(mask: torch.Tensor, active: torch.Tensor, sequence: int) -> torch.Tensor:
    """The mask with skipped tokens hidden, except from themselves: no row of scores may be all hidden.

    Args:
        mask: See `attend_among_active`.
        active: bool [batch, past + sequence].
        sequence: This step's tokens, the last ones.
    """
    places = torch.arange(active.shape[-1], device=active.device)
    seen = active[:, None, None] | (places == places[-sequence:, None])
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
