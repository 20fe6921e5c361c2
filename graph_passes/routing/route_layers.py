"""Give decoder layers a router that switches their branches per token: the masked canonical form."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, RoutingKind, leaves_keys
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.checkpoints.router_thresholds import ONE_HALF, threshold_problems, thresholds_json
from dlo_export.graph_passes.cache.attention_cache import CachedAttention, cached_attentions
from dlo_export.graph_passes.cache.use_full_mask import UseFullMaskPass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.depth.remove_identity_layers import RemoveIdentityLayersPass
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import match_masked_blocks
from dlo_export.graph_passes.find.masked_branch import Mismatch
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.routing.mask_blocks import (
    attention_problems,
    hide_skipped_tokens,
    mask_branch,
    router_constant,
)
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import (
    ROUTER_ACTIVE,
    ROUTER_SCORES,
    SERVES_KEY,
    TaggedNodes,
    role_values,
    shared_constant,
)

_OLDEST_OPSET = 13  # Unsqueeze takes its axes as an input from here on


@dataclasses.dataclass(frozen=True, eq=False)
class RouteLayersPass(GraphPass):
    """Mask the branches of routed layers: exact, standard ONNX, saves nothing; lowerings make it skip.

    Before (x enters the layer, h is the stream after attention, d the MLP branch)::

        y = Add(h, d)

    After::

        logits = Squeeze(MatMul(x, w), -1)     # w [hidden, 1]; fp32 whatever the dtype: only x is cast
        scores = Sigmoid(logits)
        active = Greater(scores, 0.5)          # or the layer's own threshold
        scale  = Add(Mul(scores, gap), a)      # a = 0.5·scale_factor − 0.5·gap; left out where scale ≡ 1
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    With kind "layer", attention is masked in the same way (before: `h = Add(x, a)`), and a state says who was active::

        present_active = Concat(past_active, active)                # bool [batch, past + sequence], graph output
        bias           = Where(Unsqueeze(present_active, [1, 2]), bias, lowest)
        k              = Where(Unsqueeze(active, -1), k, 0)         # v likewise: what skipped tokens leave in the cache
        a              = Attention(q, k, v, bias, past_key, past_value)·Wo
        h              = Add(x, Where(Unsqueeze(active, -1), a, 0))

    So a skipped token keeps x through both additions, and the two blocks keep the form in which they are found: the
    layer equals Where(active, layer(x), x). With kind "attention-active" the MLP stays as it is, and a is scaled; with
    kind "attention" so is the rest of attention, and there is no state::

        h              = Add(x, Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), a), 0))

    Scope: decoder layers of the main graph; where attention is switched, those with an Attention node that keeps its
    own cache. Semantics (arXiv 2407.11030 and its authors' code): with kind "mlp", expanded-attention routing, K/V are
    always written and a skipped token keeps h; with kind "layer", active tokens attend among active tokens, at their
    original positions, and a skipped token keeps x. After Router-Tuning (arXiv 2410.13184), attention alone: with kind
    "attention", K/V are always written; with kind "attention-active" as with "layer".

    Attributes:
        routers: Router weight of each routed layer by its index, float, hidden_size elements.
        rescale: Multiply the branch by 0.5·scale_factor + (score − 0.5)·scale_gap.
        scale_factor: Of the checkpoint's configuration; read only when `rescale`.
        scale_gap: Likewise.
        kind: What a token skips.
        thresholds: By routed layer, the score an active token exceeds, where it is not 0.5; float32 numbers.
    """

    routers: Mapping[int, np.ndarray]
    rescale: bool = False
    scale_factor: float = 2.0
    scale_gap: float = 0.0
    kind: RoutingKind = "mlp"
    thresholds: Mapping[int, float] = dataclasses.field(default_factory=dict)

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (
        InjectLayersPass,
        RemoveIdentityLayersPass,
        UseFullMaskPass,
    )
    nodes_from: ClassVar[Border | None] = "routed"

    @property
    def settings(self) -> dict[str, Any]:
        """The rule, and the routers by a digest of their float32 weights."""
        digests = {
            str(index): hashlib.sha256(weight.tobytes()).hexdigest()[:16]
            for index, weight in sorted(self._weights.items())
        }
        rule = [self.scale_factor, self.scale_gap] if self.rescale else None
        thresholds = thresholds_json(self.thresholds)
        return {
            "routers": digests,
            "rescale": rule,
            "kind": self.kind,
            **({THRESHOLDS: thresholds} if thresholds else {}),
        }

    def rewrite(self, model: ir.Model) -> bool:
        """Route every layer of `routers`.

        Raises:
            GraphPassError: With all problems: unknown layers, wrong shapes, layers that are routed already.
        """
        graph, weights = model.graph, self._weights
        layers = find_decoder_layers(graph)
        wrong = threshold_problems(thresholds_json(self.thresholds), weights.keys())
        attentions = {each.layer: each for each in self._attentions(graph)}
        self._refuse(graph, layers, weights, wrong, attentions)
        for index, weight in sorted(weights.items()):
            self._route(graph, layers[index], weight, attentions.get(index))
        if attentions:
            graph.sort()  # a mask that all layers share may stand behind the first one's decision
        self._check_masked(graph, weights)
        return True

    @property
    def _weights(self) -> dict[int, np.ndarray]:
        return {index: np.asarray(weight, np.float32).reshape(-1) for index, weight in self.routers.items()}

    @property
    def _offset(self) -> float:
        return 0.5 * self.scale_factor - 0.5 * self.scale_gap

    @property
    def _largest_scale(self) -> float:
        """Of an active token, whose score lies between its threshold and one; and of what it is computed from."""
        lowest = min((ONE_HALF, *self.thresholds.values()))
        ends = (0.5 * self.scale_factor + share * self.scale_gap for share in (lowest - 0.5, 0.0, 0.5))
        return max(map(abs, ends)) if self.rescale else 1.0

    def _attentions(self, graph: ir.Graph) -> list[CachedAttention]:
        """Nodes from which skipped tokens are hidden, or which may be left out.

        Where they leave their keys, attention in another form serves them as it is: what it adds is masked, no more.
        """
        if "self_attn" not in ROUTED_BLOCKS[self.kind]:
            return []
        if leaves_keys(self.kind) and not any(is_op(node, "Attention") for node in graph):
            return []
        return cached_attentions(graph, self._name)

    def _refuse(
        self,
        graph: ir.Graph,
        layers: tuple[DecoderLayer, ...],
        weights: Mapping[int, np.ndarray],
        wrong_thresholds: Sequence[str],
        attentions: Mapping[int, CachedAttention],
    ) -> None:
        routed = role_values(graph, ROUTER_SCORES)
        # All layers are asked before the first is routed.
        problems = [*wrong_thresholds] if weights else ["no routers were given"]
        if graph.opset_imports.get("", 0) < _OLDEST_OPSET:
            problems.append(f"the graph uses opset {graph.opset_imports.get('')}, expected {_OLDEST_OPSET} or newer")
        for index, weight in sorted(weights.items()):
            if not 0 <= index < len(layers):
                problems.append(f"layer {index} does not exist, expected 0 to {len(layers) - 1}")
                continue
            layer = layers[index]
            if weight.size != layer.hidden_size:
                problems.append(f"router {index} has {weight.size} weights, expected {layer.hidden_size}")
            if not np.isfinite(weight).all():
                problems.append(f"router {index} holds NaN or infinity, expected finite weights")
            scaled, what = self._scaled_block(layer)
            dtype = element_type(scaled.stream_operand)
            if element_type(layer.input) is None or dtype is None:
                problems.append(f"layer {index}: the element type of '{layer.input.name}' is unknown")
            elif self._largest_scale > float(dtype.max):
                largest = f"{self._largest_scale:g}, {dtype.name.lower()} ends at {float(dtype.max):g}"
                problems.append(f"layer {index}: the rule scales its {what} by up to {largest}")
            if scaled.conditional is not None:
                problems.append(f"layer {index}: {place(scaled.conditional)} skips its {what} branch already")
            if index in routed:
                problems.append(f"layer {index} is routed already")
            if attentions:
                problems += attention_problems(layer, attentions)
        if problems:
            raise GraphPassError(
                "RouteLayersPass: " + "; ".join(problems) + ".",
                hint="routers are numbered in the deepened model; route a graph once",
            )

    def _check_masked(self, graph: ir.Graph, weights: Mapping[int, np.ndarray]) -> None:
        """Lowerings look for the masked form; in a foreign graph, more than the addition may read a layer's branch.

        Where only queries serve active tokens, their projection and those of keys and values are marked: no pass may
        join the one with the others.
        """
        problems = []
        for layer in find_decoder_layers(graph):
            if layer.index not in weights:
                continue
            for _, match in match_masked_blocks(layer):
                if isinstance(match, Mismatch):
                    problems.append(match.reason)
                elif isinstance(match, MaskedAttention) and match.hidden is None and match.projections:
                    _mark_served(match)
        if problems:
            raise GraphPassError(
                "RouteLayersPass: " + "; ".join(problems) + ".",
                hint="route the checkpoint instead, or export the graph without sharing between layers",
            )

    def _scaled_block(self, layer: DecoderLayer) -> tuple[ResidualBlock, str]:
        """The block whose branch the rule scales, and what it is called."""
        return (layer.mlp, "MLP") if ROUTED_BLOCKS[self.kind][-1] == "mlp" else (layer.attention, "attention")

    def _route(
        self, graph: ir.Graph, layer: DecoderLayer, weight: np.ndarray, attention: CachedAttention | None
    ) -> None:
        # The router reads the stream that enters the layer, before attention, as the authors' code does.
        blocks, made_by = ROUTED_BLOCKS[self.kind], self._name
        decide = TaggedNodes(made_by, layer.index)
        scores, active = _add_router(graph, decide, layer, weight, self.thresholds.get(layer.index, ONE_HALF))
        dtype = element_type(self._scaled_block(layer)[0].stream_operand)
        scale = self._add_scale(graph, decide, scores, dtype, layer)
        # The decision comes before what it decides about, so that a lowering can gather in front of it.
        first = layer.attention if "self_attn" in blocks else layer.mlp
        graph.insert_before(first.nodes[0], decide.nodes)
        column = None
        if attention is not None and not leaves_keys(self.kind):
            column = hide_skipped_tokens(graph, layer, attention, active, made_by)

        # Behind each branch that is skipped, its result is kept where the token is active; the last one's is scaled.
        for block in blocks:
            factor = scale if block == blocks[-1] else None
            known = column if block == "self_attn" else None
            mask_branch(graph, layer, block, active, made_by, scale=factor, column=known)

    def _add_scale(
        self, graph: ir.Graph, nodes: TaggedNodes, scores: ir.Value, dtype: ir.DataType | None, layer: DecoderLayer
    ) -> ir.Value | None:
        """The factor of the branch: per token [batch, sequence], one constant, or None where it is 1."""
        if not self.rescale or (self.scale_gap == 0 and self._offset == 1):
            return None
        if self.scale_gap == 0:
            assert dtype is not None, "checked before routing"
            return router_constant(graph, "scale", self._offset, dtype)
        # The rule multiplied out, a + score·gap: in fp32 as the score is, and rounded to the branch's type once.
        router, tokens, float32 = router_path(layer.index), layer.token_dims, ir.DataType.FLOAT
        gap = router_constant(graph, "scale_gap", self.scale_gap)
        scale = nodes.add("Mul", scores, gap, name=f"{router}.scores_times_gap", dtype=float32, shape=tokens)
        if self._offset != 0:
            offset = router_constant(graph, "scale_offset", self._offset)
            scale = nodes.add("Add", scale, offset, name=f"{router}.scale", dtype=float32, shape=tokens)
        if dtype is not None and dtype != float32:
            scale = nodes.add("Cast", scale, name=f"{router}.scale_cast", dtype=dtype, shape=tokens, to=int(dtype))
        return scale


def _mark_served(attention: MaskedAttention) -> None:
    """Says of projections of one value whether active tokens read them or all, where that differs."""
    for node in attention.source.consumers():
        node.metadata_props.setdefault(SERVES_KEY, "all")  # a router says of itself whom it serves
    for node in attention.projections:
        node.metadata_props[SERVES_KEY] = "active"


def _add_router(
    graph: ir.Graph, nodes: TaggedNodes, layer: DecoderLayer, weight: np.ndarray, threshold: float
) -> tuple[ir.Value, ir.Value]:
    """Scores fp32 [batch, sequence] and active bool [batch, sequence], from the layer's input stream."""
    router, tokens, float32 = router_path(layer.index), layer.token_dims, ir.DataType.FLOAT
    stream = layer.input
    if element_type(stream) != float32:
        shape = (*tokens, layer.hidden_size)
        stream = nodes.add("Cast", stream, name=f"{router}.input", dtype=float32, shape=shape, to=int(float32))
    # A matrix of one column, not a vector: ONNX Runtime's CPU kernel takes six times as long with a 1-D right operand.
    router_weight = shared_constant(graph, f"{router}.weight", weight[:, np.newaxis])
    shape = (*tokens, 1)
    column = nodes.add("MatMul", stream, router_weight, name=f"{router}.logits_column", dtype=float32, shape=shape)
    # Where no norm stands before attention, the projections read the stream too; they are skipped, the router is not.
    nodes.nodes[-1].metadata_props[SERVES_KEY] = "router"
    axis = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    logits = nodes.add("Squeeze", column, axis, name=f"{router}.logits", dtype=float32, shape=tokens)
    scores = nodes.add("Sigmoid", logits, name=f"{router}.scores", dtype=float32, shape=tokens, role=ROUTER_SCORES)
    # As the rule is written, on the score: by its sign, a tiny logit whose sigmoid rounds to 0.5 would be active.
    # Most layers share one constant; a layer's own threshold has a name that says whose it is.
    own = threshold != ONE_HALF
    limit = shared_constant(graph, f"{router if own else ROUTERS}.threshold", np.array(threshold, np.float32))
    active = nodes.add(
        "Greater",
        scores,
        limit,
        name=f"{router}.active",
        dtype=ir.DataType.BOOL,
        shape=tokens,
        role=ROUTER_ACTIVE,
    )
    return scores, active
