"""Attention for the active tokens of a layer only, among all tokens or among the active ones.

Where skipped tokens leave keys, active ones attend to everybody. Where they leave none, a skipped token asks nothing
and answers nothing: its keys and values are zeros in the cache and masked everywhere. Positions and causal order are
those of all tokens (DLO, arXiv 2407.11030).
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
    projected = (
        _normed(attention.q_proj(rows), attention, "q_norm"),
        _normed(attention.k_proj(rows), attention, "k_norm"),
        attention.v_proj(rows),
    )
    query, key, value = (_heads(attention, tokens.spread(each)) for each in projected)
    query, key = _rotated(attention, query, key, position_embeddings)
    # The cache gets its entry even where nobody is active: it must stay as long as the sequence.
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx, active)
        active = active_tokens_of(past_key_values, attention.layer_idx)
    if not len(rows):
        return rows
    mask = _mask_of_active(attention_mask, active, query.shape[2])
    return _attended_rows(attention, (query, key, value), mask, tokens, **kwargs)


def attend_to_all(
    attention: LlamaAttention,
    hidden_states: torch.Tensor,
    tokens: TokenRows,
    *,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The family's attention, keys and values of every token, queries and output for some tokens only.

    Args:
        attention: Whose weights are used.
        hidden_states: The normalised stream of all tokens, [batch, sequence, hidden].
        tokens: Whom to attend for.
        attention_mask: As transformers' attention functions take it; None for causal order alone.
        position_embeddings: Cosines and sines of the rotary embedding.
        past_key_values: Any of transformers'; gets the step's keys and values.
        kwargs: Passed on to transformers' attention function.

    Returns:
        What attention adds to the rows, [n, hidden].
    """
    rows = tokens.gather(hidden_states)
    query = _heads(attention, tokens.spread(_normed(attention.q_proj(rows), attention, "q_norm")))
    key = _heads(attention, _normed(attention.k_proj(hidden_states), attention, "k_norm"))
    value = _heads(attention, attention.v_proj(hidden_states))
    query, key = _rotated(attention, query, key, position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    if not len(rows):
        return rows
    return _attended_rows(attention, (query, key, value), attention_mask, tokens, **kwargs)


def _heads(attention: LlamaAttention, values: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, heads·head_dim] as [batch, heads, sequence, head_dim]."""
    return values.view(*values.shape[:2], -1, attention.head_dim).transpose(1, 2)


def _attended_rows(
    attention: LlamaAttention,
    query_key_value: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    tokens: TokenRows,
    **kwargs: Any,
) -> torch.Tensor:
    """What attention adds to the rows of some tokens, [n, hidden]; all of them are attended for."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    attended, _ = attend(
        attention,
        *query_key_value,
        mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    added: torch.Tensor = attention.o_proj(tokens.gather(attended.flatten(2)))
    return added


def _rotated(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [batch, heads, sequence, head_dim], turned by the tables; SmolLM3 has layers that do not."""
    if not getattr(attention, "use_rope", True):
        return query, key
    turned: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(query, key, *tables)
    return turned


def _normed(rows: torch.Tensor, attention: nn.Module, name: str) -> torch.Tensor:
    """Queries or keys [..., heads · head_dim], normalised where the family does so, head by head or all at once."""
    norm = getattr(attention, name, None)
    if norm is None:
        return rows
    width = norm.weight.shape[0]
    normed: torch.Tensor = norm(rows.unflatten(-1, (-1, width))).flatten(-2)
    return normed


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
