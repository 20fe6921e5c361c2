"""What other families than Llama compute otherwise: their attention is transformers' own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, Block, LayerModule
from dlo_export.checkpoints.model_types import LLAMA
from dlo_export.modeling.configuration import LlamaDloConfig

ATTENTIONS: Mapping[str, type[nn.Module]] = {
    "llama": LlamaAttention,
    "qwen2": Qwen2Attention,
    "qwen3": Qwen3Attention,
    "smollm3": SmolLM3Attention,
    "granite": GraniteAttention,
    "olmo2": Olmo2Attention,
}
"""By family."""


class ScaledLinear(nn.Linear):
    """A linear layer whose output is multiplied by a constant: whoever calls it need not know of Granite's factors.

    Args:
        in_features: As of a linear layer, like the two that follow.
        out_features: Likewise.
        bias: Likewise.
        factor: The constant.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, factor: float) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The product of [..., in], [..., out]."""
        return super().forward(values) * self.factor


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a constant when they are looked up.

    Args:
        factor: The constant.
    """

    def __init__(self, *sizes: int | None, factor: float) -> None:
        super().__init__(*sizes)  # type: ignore[arg-type]  # the padding token may be None
        self.factor = factor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows [..., hidden] of tokens [...]."""
        return super().forward(tokens) * self.factor


class StepRotaryEmbedding(LlamaRotaryEmbedding):
    """transformers' rotary embedding, its frequencies those of the step alone.

    Where they depend on the length (`dynamic`), transformers' keeps those of the longest sequence that it has seen
    until a short one comes: what a model computes would depend on what it computed before.
    """

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [batch, sequence, head_dim]."""
        if (self.config.rope_parameters or {}).get("rope_type") == "dynamic":
            self.max_seq_len_cached = self.original_max_seq_len
            self.inv_freq = self.original_inv_freq
        tables: tuple[torch.Tensor, torch.Tensor] = super().forward(x, position_ids)
        return tables


def use_family_modules(layer: LlamaDecoderLayer, config: LlamaDloConfig, index: int) -> None:
    """Puts the family's attention and norms into a Llama's layer, and its factor into what the blocks add.

    Args:
        layer: Number `index` of the model.
        config: Of the model.
        index: As above.
    """
    if config.family.name == "llama":
        return
    layer.self_attn = ATTENTIONS[config.family.name](config, index)  # type: ignore[assignment]  # of one interface
    if config.family.has_multipliers:
        for block, role in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            setattr(block, role, _scaled(getattr(block, role), config.residual_multiplier))
    if config.family.layer is not LLAMA_LAYER:
        for module in filter(_is_block_norm, LLAMA_LAYER):
            delattr(layer, module.path)
        for module in filter(_is_block_norm, config.family.layer):
            setattr(layer, module.path, rms_norm(config))


def _is_block_norm(module: LayerModule) -> bool:
    return module.axes == ("hidden",)


def rms_norm(config: LlamaDloConfig) -> nn.Module:
    """The family's norm over the hidden size."""
    norm = Olmo2RMSNorm if config.family.name == "olmo2" else LlamaRMSNorm
    module: nn.Module = norm(config.hidden_size, eps=config.rms_norm_eps)
    return module


def block_input(layer: LlamaDecoderLayer, block: Block, stream: torch.Tensor) -> torch.Tensor:
    """What attention or MLP reads of the stream [..., hidden]: normalised, unless the family does so behind the block.

    Args:
        layer: transformers' Llama's, or one of ours.
        block: Of the two.
        stream: Its input.
    """
    return _block_normed(layer, block, stream, behind=False)


def block_branch(layer: LlamaDecoderLayer, block: Block, output: torch.Tensor) -> torch.Tensor:
    """What attention or MLP adds to the stream, [..., hidden], of its output; arguments as of `block_input`."""
    return _block_normed(layer, block, output, behind=True)


def _block_normed(layer: LlamaDecoderLayer, block: Block, values: torch.Tensor, *, behind: bool) -> torch.Tensor:
    # transformers' own Llama has a configuration that knows no family.
    family = getattr(layer.self_attn.config, "family", LLAMA)
    norm = family.layer.block_norm(block, behind=behind)
    normed: torch.Tensor = values if norm is None else getattr(layer, norm.path)(values)
    return normed


def _scaled(linear: nn.Linear, factor: float) -> ScaledLinear:
    return ScaledLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, factor=factor)


def token_embedding(config: LlamaDloConfig) -> nn.Embedding:
    """The family's embedding of tokens."""
    sizes = (config.vocab_size, config.hidden_size, config.pad_token_id)
    if config.family.has_multipliers:
        return ScaledEmbedding(*sizes, factor=config.embedding_multiplier)
    return nn.Embedding(*sizes)


def language_head(config: LlamaDloConfig) -> nn.Linear:
    """The family's head."""
    sizes = (config.hidden_size, config.vocab_size)
    if config.family.has_multipliers:
        return ScaledLinear(*sizes, bias=False, factor=1 / config.logits_scaling)
    return nn.Linear(*sizes, bias=False)
