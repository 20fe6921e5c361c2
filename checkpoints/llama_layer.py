"""What a decoder layer consists of: a Llama's table of its weights, OLMo2's, and the names they have in checkpoints.

Whoever names a weight of a layer takes it from here: the checks of checkpoints and adapters, the plain graph, the
search for projections in other people's graphs, GGUF, depth scaling. What only some families have (biases of q, k and v
alone, norms of queries and keys) stands here too, with the field of the configuration that says whether it is there. A
family whose norms stand in other places has a table of its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Axis = Literal["query", "key-value", "head", "hidden", "intermediate"]
Block = Literal["self_attn", "mlp"]
BiasFlag = Literal["qkv_bias", "attention_bias", "mlp_bias"]
ModuleFlag = Literal["qk_norm"]


@dataclass(frozen=True)
class LayerModule:
    """One module of a decoder layer: a projection or a norm.

    Attributes:
        role: "q_proj"; what graph passes call it.
        block: Which residual block computes with it.
        path: Its Hugging Face name inside the layer, "self_attn.q_proj".
        axes: Names of its weight's dimensions, [out, in] for a projection, one for a norm.
        gguf: Its name in a GGUF file, between the layer's and ".weight".
        bias: The field of the configuration that says whether it has a bias; None where it never has one.
        rotated: Whether its output is turned by the rotary embedding, head by head.
        ends_branch: Whether its output is what the block adds to the residual stream: where all of these are zeros, the
            layer is the identity.
        behind: Of a norm over the hidden size: whether it normalises what the block adds to the stream, and not what
            the block reads of it.
        only_with: The field of the configuration that says whether layers have it at all; None where every one has.
    """

    role: str
    block: Block
    path: str
    axes: tuple[Axis, ...]
    gguf: str
    bias: BiasFlag | None = None
    rotated: bool = False
    ends_branch: bool = False
    behind: bool = False
    only_with: ModuleFlag | None = None

    @property
    def is_norm(self) -> bool:
        """Whether it scales a normalised vector, instead of being a matrix."""
        return len(self.axes) == 1

    @property
    def weight(self) -> str:
        """The weight's Hugging Face name inside the layer."""
        return f"{self.path}.weight"

    @property
    def bias_name(self) -> str:
        """The bias's Hugging Face name inside the layer."""
        return f"{self.path}.bias"

    def tensors(self) -> dict[str, tuple[Axis, ...]]:
        """Names inside the layer, and axes, of every tensor it can have."""
        biases = {} if self.bias is None else {self.bias_name: self.axes[:1]}
        return {self.weight: self.axes, **biases}


@dataclass(frozen=True)
class LayerTable:
    """All modules of one family's decoder layer.

    Attributes:
        modules: In the order in which their tensors are written.
    """

    modules: tuple[LayerModule, ...]

    def __iter__(self) -> Iterator[LayerModule]:
        return iter(self.modules)

    def __getitem__(self, role: str) -> LayerModule:
        return self._by_role[role]

    def block_norm(self, block: Block, *, behind: bool) -> LayerModule | None:
        """The norm of what a block reads of the stream, or of what it adds to it; None where the family has none."""
        norms = (module for module in self.modules if module.block == block and module.axes == ("hidden",))
        return next((norm for norm in norms if norm.behind == behind), None)

    @functools.cached_property
    def _by_role(self) -> Mapping[str, LayerModule]:
        return {module.role: module for module in self.modules}

    @functools.cached_property
    def axes(self) -> Mapping[str, tuple[Axis, ...]]:
        """Axes of every tensor that a layer can have, by its name inside the layer."""
        return {name: axes for module in self.modules for name, axes in module.tensors().items()}

    @functools.cached_property
    def required(self) -> tuple[str, ...]:
        """Names inside the layer of the tensors that every layer has; there may be biases and norms besides."""
        return tuple(module.weight for module in self.modules if module.only_with is None)

    @functools.cached_property
    def branch_ends(self) -> frozenset[str]:
        """Names inside the layer of the tensors whose zeros make the layer the identity."""
        return frozenset(name for module in self.modules if module.ends_branch for name in module.tensors())


def _attention(
    letter: str, axes: tuple[Axis, Axis], gguf: str, bias: BiasFlag, *, rotated: bool = False, ends: bool = False
) -> LayerModule:
    role = f"{letter}_proj"
    return LayerModule(role, "self_attn", f"self_attn.{role}", axes, gguf, bias, rotated, ends)


def _qk_norm(letter: str, axis: Axis) -> LayerModule:
    """Of queries or keys: one weight for all heads, of which each is normalised by itself, or one over all of them."""
    role = f"{letter}_norm"
    return LayerModule(role, "self_attn", f"self_attn.{role}", (axis,), f"attn_{role}", only_with="qk_norm")


def _mlp(role: str, axes: tuple[Axis, Axis], gguf: str, *, ends: bool = False) -> LayerModule:
    return LayerModule(role, "mlp", f"mlp.{role}", axes, gguf, "mlp_bias", ends_branch=ends)


def _norm(role: str, block: Block, gguf: str, *, behind: bool = False) -> LayerModule:
    return LayerModule(role, block, role, ("hidden",), gguf, behind=behind)


_ATTENTION = (
    _attention("q", ("query", "hidden"), "attn_q", "qkv_bias", rotated=True),
    _attention("k", ("key-value", "hidden"), "attn_k", "qkv_bias", rotated=True),
    _attention("v", ("key-value", "hidden"), "attn_v", "qkv_bias"),
    _attention("o", ("hidden", "query"), "attn_output", "attention_bias", ends=True),
)
_MLP = (
    _mlp("gate_proj", ("intermediate", "hidden"), "ffn_gate"),
    _mlp("up_proj", ("intermediate", "hidden"), "ffn_up"),
    _mlp("down_proj", ("hidden", "intermediate"), "ffn_down", ends=True),
)
LLAMA_LAYER = LayerTable(
    (
        _norm("input_layernorm", "self_attn", "attn_norm"),
        *_ATTENTION,
        _qk_norm("q", "head"),
        _qk_norm("k", "head"),
        *_MLP,
        _norm("post_attention_layernorm", "mlp", "ffn_norm"),
    )
)
OLMO2_LAYER = LayerTable(
    (
        *_ATTENTION,
        _qk_norm("q", "query"),
        _qk_norm("k", "key-value"),
        _norm("post_attention_layernorm", "self_attn", "post_attention_norm", behind=True),
        *_MLP,
        _norm("post_feedforward_layernorm", "mlp", "post_ffw_norm", behind=True),
    )
)
"""Norms stand behind attention and MLP, those of queries and keys go over all heads (OLMo 2, arXiv 2501.00656)."""
LAYER_TABLES = (LLAMA_LAYER, OLMO2_LAYER)
"""Of all families. They have the same projections under the same names, and differ in norms."""


def table_of(tensors: Iterable[str]) -> LayerTable:
    """The table that knows the most of these names inside layers; a Llama's where they tell nothing."""
    names = set(tensors)
    return max(LAYER_TABLES, key=lambda table: len(names & table.axes.keys()))


MAX_LAYERS = 10_000
"""Of a model. Much is listed per layer: a damaged count must not fill the memory."""
LAYER_NUMBER = "(0|[1-9][0-9]{0,8})"
"""Pattern of a layer's number in a name. Nine digits at most: a damaged name may have more than Python makes an integer
of. And no digits of other scripts, by which one layer would have several names."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ROUTERS = "model.routers"
"""The module that holds all routers."""
GGUF_OUTER_NAMES: Mapping[str, str] = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": HEAD,
}
"""Of the tensors that belong to no layer."""

# Anchored: "model.layers.1." must not match "model.layers.11.".
_LAYER_TENSOR = re.compile(rf"model\.layers\.{LAYER_NUMBER}\.(.+)")
_ROUTER = re.compile(rf"model\.routers\.{LAYER_NUMBER}\.weight")


class LayerTensorName(NamedTuple):
    """What the name of a layer's tensor says."""

    layer: int
    tensor: str


def layer_path(layer: int) -> str:
    """Name of a layer's module, and the prefix of what passes name after it."""
    return f"model.layers.{layer}"


def layer_tensor_name(layer: int, tensor: str) -> str:
    """Hugging Face name of a layer's tensor (or module) that has the name `tensor` inside the layer."""
    return f"{layer_path(layer)}.{tensor}"


def parse_layer_tensor(name: str) -> LayerTensorName | None:
    """The layer and the name inside it of a layer's tensor; None for any other name."""
    match = _LAYER_TENSOR.fullmatch(name)
    return None if match is None else LayerTensorName(int(match[1]), match[2])


def router_path(layer: int) -> str:
    """Name of a router's module, and the prefix of what passes name after it."""
    return f"{ROUTERS}.{layer}"


def router_name(layer: int) -> str:
    """Name of a layer's router, [1, hidden]."""
    return f"{router_path(layer)}.weight"


def parse_router(name: str) -> int | None:
    """The layer whose router has this name; None for any other name."""
    match = _ROUTER.fullmatch(name)
    return None if match is None else int(match[1])
