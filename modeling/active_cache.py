"""The KV cache of a layer that tokens skip whole: it knows which of its tokens were active.

A skipped token leaves no keys and values there. Its place is kept, with zeros, so that all layers' caches have one
length and can be cropped, reordered and padded alike; who attends to the cache hides those places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dlo_export.checkpoints.errors import InputError


class CacheError(InputError):
    """A cache that cannot say which tokens were active."""


class ActiveLayerCache(DynamicLayer):
    """transformers' growing cache of one layer, and which of its tokens were active.

    Attributes:
        active: bool [batch, past]; None before the first token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, active: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens.

        Args:
            key_states: [batch, kv_heads, sequence, head_dim], zeros at skipped tokens.
            value_states: Likewise.
            active: bool [batch, sequence].
            args: Ignored, as by transformers.
            kwargs: Likewise.

        Returns:
            All tokens' keys and values, [batch, kv_heads, past + sequence, head_dim].
        """
        self.active = active if self.active is None else torch.cat([self.active, active], dim=-1)
        keys, values = super().update(key_states, value_states)
        return keys, values

    # What else changes a cache: all that transformers' layer does with keys and values.

    def reset(self) -> None:
        """Empties it."""
        super().reset()
        self.active = None

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, of which there are as many as the number is below 0."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.active is not None:
            self.active = self.active[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes these sequences in place of the ones it has, for beam search."""
        super().reorder_cache(beam_idx)
        if self.active is not None:
            self.active = self.active.index_select(0, beam_idx.to(self.active.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        super().batch_repeat_interleave(repeats)
        if self.active is not None:
            self.active = self.active.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences."""
        super().batch_select_indices(indices)
        if self.active is not None:
            self.active = self.active[indices, ...]


def add_active_state(cache: Cache, routed_layers: Sequence[int], num_layers: int) -> None:
    """Makes the routed layers of an empty cache remember which tokens are active; one that does stays as it is.

    Args:
        cache: transformers' DynamicCache, as `generate` makes it or as it comes from an earlier step.
        routed_layers: Indices of the layers that tokens skip whole.
        num_layers: Of the model.

    Raises:
        CacheError: It is of another kind, or was filled by another model.
    """
    if not isinstance(cache, DynamicCache):
        raise CacheError(
            f"cache: found a {type(cache).__name__}, a model whose tokens skip whole layers needs a DynamicCache",
            hint="leave out cache_implementation, or pass past_key_values=DynamicCache()",
        )
    # One without a configuration makes its layers when they are first used.
    cache.layers.extend(DynamicLayer() for _ in range(num_layers - len(cache.layers)))
    for layer in routed_layers:
        if isinstance(cache.layers[layer], ActiveLayerCache):
            continue
        if tokens := cache.get_seq_length(layer):
            raise CacheError(
                f"cache: layer {layer} holds {tokens} tokens and does not say which of them were active",
                hint="start with an empty cache; those of other models do not fit",
            )
        cache.layers[layer] = ActiveLayerCache()


def active_tokens_of(cache: Cache, layer: int) -> torch.Tensor:
    """Which cached tokens were active in a routed layer, bool [batch, past]."""
    state = cache.layers[layer]
    assert isinstance(state, ActiveLayerCache), "add_active_state made it"
    assert state.active is not None, "asked for behind an update"
    return state.active
