"""Decoders of known shapes, as a source of graphs that get their weights later."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common.random_llama import H2048, RandomTensor
from dlo_export.checkpoints.adapter.adapter import DloAdapter
from dlo_export.checkpoints.config import LlamaConfig, RoutingConfig
from dlo_export.checkpoints.model_types import RoutingKind, leaves_keys
from dlo_export.exporter.plain_graph.llama import plain_graph

# What differs from H2048, the shape of a 1B model with eight layers.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
    },
    # Layers of SmolLM2-135M's size, and of a 1B model's; heads next to nothing, so that a step is its layers.
    "h576": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 1024,
    },
    "h2048": {"num_hidden_layers": 2, "vocab_size": 1024},
    "1b-2-layers": {"num_hidden_layers": 2, "vocab_size": 128256},
    "8b-2-layers": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "1b": {"num_hidden_layers": 16, "vocab_size": 128256},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


@dataclasses.dataclass(frozen=True)
class RandomDecoder:
    """A `GraphSource` of one of `SHAPES`.

    Attributes:
        name: Of the shape.
        routed: Whether every layer has a router.
        rescale: Whether routers scale what they let through, as DLO's authors' do and calibrated ones do not.
        kind: What a token skips.
    """

    name: str
    routed: bool
    rescale: bool = False
    kind: RoutingKind = "mlp"

    adapter: DloAdapter | None = None
    removed_layers: tuple[int, ...] = ()
    packs_weights: bool = True

    @property
    def config(self) -> LlamaConfig:
        """Its configuration, without routers."""
        return LlamaConfig.from_dict({**H2048, **SHAPES[self.name]}, self.name)

    @property
    def routing(self) -> RoutingConfig | None:
        """Of every layer."""
        layers, gap = tuple(range(self.config.num_layers)), 0.05 if self.rescale else 0.0
        return RoutingConfig(self.kind, layers, self.rescale, scale_factor=2.0, scale_gap=gap) if self.routed else None

    @property
    def remembers_activity(self) -> bool:
        """Whether its graph has a state beside the KV cache."""
        return self.routed and not leaves_keys(self.kind)

    @property
    def mlp_bytes(self) -> int:
        """Weights of one layer's MLP, in 16 bits."""
        return 3 * self.config.hidden_size * self.config.intermediate_size * 2

    def routers(self) -> dict[int, np.ndarray]:
        """Random ones, small enough that no score rounds to 0 or 1."""
        config = self.config
        rng = np.random.default_rng(0)
        drawn = rng.standard_normal((config.num_layers, config.hidden_size), np.float32)
        return dict(enumerate(drawn / np.float32(config.hidden_size)))

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        """The decoder in standard operators; nobody reads its weights from here."""
        shapes = self.config.tensor_shapes()
        return plain_graph(self.config, {key: RandomTensor(key, shape) for key, shape in shapes.items()}, dtype)

    engine_model = plain_model
