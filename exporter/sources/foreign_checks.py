"""What of somebody's graph cannot be exported, asked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.interface import TOKEN_INPUTS
from dlo_export.exporter.sources.foreign_weights import why_unnamed
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.projections import branch_ends
from dlo_export.graph_passes.spec.ops import MICROSOFT

# What measures a scale of all that it is given.
_ROUND_TOGETHER = {("", "DynamicQuantizeLinear"), (MICROSOFT, "DynamicQuantizeMatMul")}


def check_token_inputs(path: Path, graph: ir.Graph) -> None:
    """Refuses token ids, masks and positions of another type than runtimes feed.

    Raises:
        InputError: With the first such input.
    """
    for value in graph.inputs:
        if value.name in TOKEN_INPUTS and value.dtype not in (None, ir.DataType.INT64):
            raise InputError(
                f"{path}: input {value.name} is {value.dtype.name.lower()}, expected int64",
                hint="export it again with 64-bit token ids, masks and positions, which is what runtimes feed",
            )


def check_tokens_stand_alone(path: Path, layers: Sequence[DecoderLayer]) -> None:
    """Refuses activations that one scale rounds for all tokens: who is beside a token changes what it computes.

    Raises:
        InputError: With the first place.
    """
    nodes = ((layer.index, node) for layer in layers for node in layer.nodes)
    found = next(((index, node) for index, node in nodes if (node.domain, node.op_type) in _ROUND_TOGETHER), None)
    if found is not None:
        raise InputError(
            f"{path}: layer {found[0]}: {place(found[1])} rounds the activations of all tokens by one scale, "
            "so what a token computes depends on the tokens beside it; routing is of each token by itself",
            hint="route the graph before it is quantised, and quantise the artefact; or quantise the weights alone "
            "(MatMulNBits, DequantizeLinear)",
        )


def check_one_mlp_a_layer(path: Path, layers: Sequence[DecoderLayer]) -> None:
    """Refuses experts: each would be somebody's MLP, and the sum of them is nobody's.

    Raises:
        InputError: With the first layer that has some.
    """
    for layer in layers:
        if why_unnamed(layer) is None:
            continue
        try:
            ends = branch_ends(layer.mlp)
        except GraphPassError:
            continue  # a quantisation that nobody here reads: its MLP is masked all the same
        if len(ends) > 1:
            raise InputError(
                f"{path}: the MLP of layer {layer.index} ends in {len(ends)} matrices, {', '.join(ends[:4])}; "
                "expected one, down_proj",
                hint="only Llamas and their relatives can be routed or deepened, no mixtures of experts",
            )


def check_config_fits(
    path: Path, config: LlamaConfig, layers: Sequence[DecoderLayer], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses a config.json of another model than the graph that it lies beside.

    Args:
        path: The graph.
        config: From the config.json beside it.
        layers: Of the graph.
        shapes: Of its weights, by Hugging Face names, as far as they have such.

    Raises:
        CheckpointError: With all that differs.
    """
    found = {"layers": len(layers), **_cache_sizes(layers[0]), **shapes}
    expected = {
        "layers": config.num_layers,
        "KV heads": config.num_kv_heads,
        "head size": config.head_dim,
        **config.tensor_shapes(),
    }
    problems = [
        f"{what} {expected[what]} in config.json, {found[what]} in the graph"
        for what in found
        if what in expected and found[what] != expected[what]
    ]
    if problems:
        raise CheckpointError(
            f"{path.parent / 'config.json'}: is of another model than {path.name}: " + "; ".join(problems),
            hint="put the config.json of the exported model beside the graph",
        )


def _cache_sizes(layer: DecoderLayer) -> dict[str, int]:
    """KV heads and head size, as far as the cache's input says them: [batch, kv_heads, past, head_dim]."""
    shape = layer.past_key.shape
    if shape is None or len(shape) != 4:
        return {}
    return {name: dim for name, dim in (("KV heads", shape[1]), ("head size", shape[3])) if isinstance(dim, int)}
