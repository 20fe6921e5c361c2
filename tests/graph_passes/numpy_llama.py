"""A Llama with routed MLPs or layers in NumPy: what graphs are compared with, written for reading, not for speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Routers, and the rule of the DLO authors' code: active iff score > 0.5, scale 0.5·factor + (score − 0.5)·gap.

    By `kind`, a skipped token skips its MLP ("mlp"), attention ("attention", "attention-active") or both ("layer").
    With "layer" and "attention-active" nobody attends to it either.
    """

    routers: Mapping[int, np.ndarray]
    rescale: bool = False
    scale_factor: float = 2.0
    scale_gap: float = 0.0
    kind: str = "mlp"


@dataclasses.dataclass(frozen=True)
class Result:
    """Logits [batch, sequence, vocab], and each routed layer's scores and decisions [batch, sequence]."""

    logits: np.ndarray
    scores: dict[int, np.ndarray]
    active: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NumpyLlama:
    """A Llama by its weights under Hugging Face names.

    Attributes:
        weights: Linear weights [out, in].
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        eps: Of the norms.
        theta: Of the rotary embedding.
    """

    weights: Weights
    num_layers: int
    num_heads: int
    num_kv_heads: int
    eps: float = 1e-5
    theta: float = 10000.0

    def run(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        routing: Routing | None = None,
        force_active: Mapping[int, np.ndarray] | None = None,
    ) -> Result:
        """Run whole sequences at once, without a cache."""
        routing = routing or Routing({})
        result = Result(np.zeros(0), {}, {})
        x = self.weights["model.embed_tokens.weight"][input_ids].astype(np.float32)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            normed = self._norm(x, f"{prefix}.input_layernorm")
            seen, scale, kind, active = attention_mask, np.float32(1), "", np.ones(x.shape[:2], bool)
            if layer in routing.routers:
                score = 1 / (1 + np.exp(-(x @ routing.routers[layer].reshape(-1))))
                result.scores[layer] = score
                result.active[layer] = (force_active or {}).get(layer, score > 0.5)
                if routing.rescale:
                    scale = (0.5 * routing.scale_factor + (score - 0.5) * routing.scale_gap)[..., None]
                kind, active = routing.kind, result.active[layer]
            if kind in ("layer", "attention-active"):
                seen = attention_mask * active
            attended = self._attention(f"{prefix}.self_attn", normed, seen, position_ids)
            if kind in ("attention", "attention-active"):
                attended = np.where(active[..., None], scale * attended, 0)
            h = x + attended
            branch = self._mlp(f"{prefix}.mlp", self._norm(h, f"{prefix}.post_attention_layernorm"))
            y = h + (scale * branch if kind in ("mlp", "layer") else branch)
            kept = {"mlp": h, "layer": x}.get(kind, y)
            x = np.where(active[..., None], y, kept)
        normed = self._norm(x, "model.norm")
        return dataclasses.replace(result, logits=normed @ self.weights["lm_head.weight"].T)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[f"{name}.weight"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        product = x @ self.weights[f"{name}.weight"].T
        return product + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else product

    def _mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        gate = self._linear(x, f"{name}.gate_proj")
        return self._linear(gate / (1 + np.exp(-gate)) * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def _attention(self, name: str, x: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        batch, sequence, _ = x.shape
        query = self._heads(self._linear(x, f"{name}.q_proj"), self.num_heads)
        key = self._heads(self._linear(x, f"{name}.k_proj"), self.num_kv_heads)
        value = self._heads(self._linear(x, f"{name}.v_proj"), self.num_kv_heads)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        groups = self.num_heads // self.num_kv_heads
        key, value = np.repeat(key, groups, 1), np.repeat(value, groups, 1)
        visible = np.tril(np.ones((sequence, sequence), bool)) & mask[:, None, None, :].astype(bool)
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
        scores = np.where(visible, scores, np.finfo(np.float32).min)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ value
        return self._linear(attended.swapaxes(1, 2).reshape(batch, sequence, -1), f"{name}.o_proj")

    @staticmethod
    def _heads(x: np.ndarray, count: int) -> np.ndarray:
        return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-np.arange(half, dtype=np.float64) / half)
        angles = (positions[..., None] * frequencies)[:, None].astype(np.float32)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
