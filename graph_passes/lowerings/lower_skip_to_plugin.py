"""Make routed layers skip inside the dlo operators: fixed shapes, the kernels select the active tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import constant_scalar, element_type, is_constant, is_op, producer_of
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank
from dlo_export.graph_passes.lowerings.compacted_rows import CompactedRows
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass, cast_problems
from dlo_export.graph_passes.lowerings.mlp_on_rows import run_mlp_on_rows
from dlo_export.graph_passes.lowerings.record import LoweringRecord
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.data_dependent_shapes import data_dependent_shapes
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.ops import DOMAIN, MICROSOFT, SKIP_DOWN, SKIP_GATE_UP, VERSION
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant


@dataclasses.dataclass(frozen=True)
class LowerSkipToPluginPass(LoweringPass):
    """Replace the routed MLP behind its norm by `dlo::SkipGateUp` and `dlo::SkipDown`.

    Before::

        n      = RMSNormalization(h)
        g      = MatMul(n, Wg)
        d      = MatMul(Mul(Mul(g, Sigmoid(g)), MatMul(n, Wu)), Wd)
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After::

        n      = RMSNormalization(h)                         # for all tokens: it is next to nothing
        factor = Where(active, scale, 0)                     # float32 [batch, sequence]; 0 skips the token
        gated  = dlo::SkipGateUp(n, factor, Wg, Wu)
        y      = dlo::SkipDown(gated, factor, Wd, h)

    No shape depends on data. Where tokens skip whole layers, attention stays masked: the operators compute MLPs. Scope:
    every routed decoder layer of the main graph, its MLP gated by SiLU and without biases. Source:
    graph_passes/spec/ops.py.

    With `quantised_on_rows` an MLP whose weights are quantised, which the operators do not read, is the graph's own and
    runs on the active tokens' rows, as `LowerSkipToCompactionPass` has it. What finds the rows becomes the library's in
    the end (`FuseRouterGatherPass`), whose operator's shape depends on data.

    Attributes:
        quantised_on_rows: Take MLPs of quantised weights too; they are refused otherwise.
    """

    quantised_on_rows: bool = False

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, UseStaticCachePass)

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """What the MLP is instead of the one the plugins compute, or a cast between stream and sum."""
        if self.quantised_on_rows and _is_quantised(masked):
            return row_rank(masked.nodes)[1]
        found = _match(masked)
        return [*([] if isinstance(found, _GatedMlp) else [found]), *cast_problems(masked)]

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """None: it is left as it is."""
        del masked
        return ()

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Leave it masked."""

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Put the two plugins in place of one layer's MLP, or run it on rows."""
        if self.quantised_on_rows and _is_quantised(masked):
            run_mlp_on_rows(graph, masked, CompactedRows(graph, masked, self._name, masked.nodes[0]))
            return
        parts = _match(masked)
        assert isinstance(parts, _GatedMlp), "asked by problems"
        graph.opset_imports[DOMAIN] = VERSION
        _write_plugins(graph, masked, parts)


@dataclasses.dataclass(frozen=True)
class _GatedMlp:
    """The nodes of silu(x·Wg) * (x·Wu) · Wd."""

    normed: ir.Value
    gate_weight: ir.Value
    up_weight: ir.Value
    down_weight: ir.Value


def _is_quantised(masked: MaskedMlp) -> bool:
    """Whether nodes multiply by codes, or by what is made of codes."""
    weights = [value for node in masked.nodes for value in node.inputs if is_constant(value)]
    return any(is_op(node, "MatMulNBits", domain=MICROSOFT) for node in masked.nodes) or any(
        is_op(producer_of(weight), "DequantizeLinear") for weight in weights
    )


def _unscaled(masked: MaskedMlp) -> tuple[ir.Value, float]:
    """The branch before its scale, and the scale where that is one number for all tokens."""
    scaling = masked.kept.producer()
    if not is_op(scaling, "Mul"):
        return masked.kept, 1.0
    inner = {output for node in masked.nodes for output in node.outputs}
    for index in (0, 1):
        branch, factor = scaling.inputs[index], scaling.inputs[1 - index]
        if branch is None or branch not in inner:
            continue
        # A scale per token becomes the factor itself; a constant one is multiplied into it.
        if scaling is masked.scaling:
            return branch, 1.0
        if (number := constant_scalar(factor)) is not None:
            return branch, number
    return masked.kept, 1.0


def _match(masked: MaskedMlp) -> _GatedMlp | str:
    """The MLP's parts, or what was found instead of them."""
    # Backwards from the branch: down_proj, the product it reads, and in either order silu(gate) and up.
    expected = "the plugins compute down(silu(gate(x)) * up(x)) without biases"
    down = _unscaled(masked)[0].producer()
    if not is_op(down, "MatMul"):
        return f"its branch ends in {place(down) if down else 'an input'}; {expected}"
    product = producer_of(down.inputs[0])
    if not is_op(product, "Mul"):
        return f"{place(down)} does not read a product; {expected}"
    # Products commute: either operand may be the silu. Gate and up must read one value, the normalised stream.
    for silu_index in (0, 1):
        gate = _silu_operand(product.inputs[silu_index])
        up = producer_of(product.inputs[1 - silu_index])
        if gate is None or up is None or not is_op(gate, "MatMul") or not is_op(up, "MatMul"):
            continue
        normed = gate.inputs[0]
        if normed is None or normed is not up.inputs[0]:
            continue
        # The plugins get the weights as they are stored: nothing may stand between to turn or cast them.
        weights = (gate.inputs[1], up.inputs[1], down.inputs[1])
        if any(weight is None or not weight.is_initializer() for weight in weights):
            return f"a weight of {place(gate)}, {place(up)} or {place(down)} is not stored as MatMul reads it"
        return _GatedMlp(normed, *(weight for weight in weights if weight is not None))
    return f"{place(product)} does not multiply silu(x·gate) with x·up; {expected}"


def _silu_operand(value: ir.Value | None) -> ir.Node | None:
    """What computes x where the value is x·sigmoid(x), written as Swish or as Mul and Sigmoid."""
    node = producer_of(value)
    if node is None:
        return None
    if is_op(node, "Swish") and ("alpha" not in node.attributes or node.attributes["alpha"].as_float() == 1):
        return producer_of(node.inputs[0])
    if not is_op(node, "Mul"):
        return None
    for index in (0, 1):
        sigmoid = producer_of(node.inputs[index])
        if is_op(sigmoid, "Sigmoid") and sigmoid.inputs[0] is node.inputs[1 - index]:
            return producer_of(sigmoid.inputs[0])
    return None


def _write_plugins(graph: ir.Graph, masked: MaskedMlp, parts: _GatedMlp) -> None:
    layer, block, mlp, router = masked.layer, masked.block, masked.path, router_path(masked.layer.index)
    dtype = element_type(block.stream_in)
    new = TaggedNodes(LowerSkipToPluginPass.__name__, layer.index)
    factor = _factor(graph, masked, new, f"{router}.factor")
    gate = parts.gate_weight.const_value
    assert gate is not None, "an initializer has contents"
    lookup: dict[str, Any] = dict(SKIP_GATE_UP.attributes)  # by which TensorRT's parser finds the plugins

    # Both keep the shape of all tokens: which rows are computed is decided on the device, by the factor.
    gated = new.add(
        SKIP_GATE_UP.name,
        parts.normed,
        factor,
        parts.gate_weight,
        parts.up_weight,
        name=f"{mlp}.skip_gate_up",
        dtype=dtype,
        shape=(*layer.token_dims, int(gate.shape.numpy()[1])),
        domain=DOMAIN,
        **lookup,
    )
    total = new.add(
        SKIP_DOWN.name,
        gated,
        factor,
        parts.down_weight,
        block.stream_in,
        name=f"{mlp}.skip_down",
        dtype=dtype,
        shape=block.stream_out.shape,
        closes=0,
        domain=DOMAIN,
        **lookup,
    )
    graph.insert_before(block.add, new.nodes)

    # With the addition go its mask, its scale and the MLP's own nodes: what served only them.
    replace_value(block.stream_out, total)
    remove_with_sources(graph, block.add)


def _factor(graph: ir.Graph, masked: MaskedMlp, new: TaggedNodes, name: str) -> ir.Value:
    """What the branch is multiplied by, float32 [batch, sequence], 0 where the token is skipped."""
    tokens, float32 = masked.layer.token_dims, ir.DataType.FLOAT
    _, number = _unscaled(masked)
    # Without a scale the decision is the factor: 1 or 0.
    if masked.scale is not None:
        scale = _before_rounding(masked.scale)
    elif number == 1:
        return new.add("Cast", masked.active, name=name, dtype=float32, shape=tokens, to=int(float32))
    else:
        scale = shared_constant(graph, f"{ROUTERS}.constant_factor_{number}", np.array(number, np.float32))
    zero = shared_constant(graph, f"{ROUTERS}.no_factor", np.array(0, np.float32))
    return new.add("Where", masked.active, scale, zero, name=name, dtype=float32, shape=tokens)


def _before_rounding(scale: ir.Value) -> ir.Value:
    """The router's float32 scale: RouteLayersPass rounds it to 16 bits for the masked form's multiplication."""
    cast = scale.producer()
    source = cast.inputs[0] if is_op(cast, "Cast") else scale
    assert source is not None, "Cast has an input"
    return source


RECORD = LoweringRecord(
    name="plugin",
    targets=("onnxruntime-cuda", "tensorrt"),
    make_pass=lambda workload: LowerSkipToPluginPass(),
    stage=lowered_stage(
        LowerSkipToPluginPass.__name__,
        checks=(data_dependent_shapes,),
        domains=frozenset({DOMAIN}),
        blocks=("mlp",),
    ),
    skips="tokens",
    not_capturable=None,
    reason="no shape depends on data, so a CUDA graph captures decode",
    # Of whole layers it skips the MLP alone, and would have to be measured first.
    suits=lambda workload: workload.plugins_at_hand and workload.phase != "prefill" and workload.routing == "mlp",
    routing=("mlp", "layer"),
    blocks=("mlp",),
    domains=(DOMAIN,),
    operators=(f"{DOMAIN}::SkipGateUp",),
    tensorrt_layers=frozenset({"PLUGIN_V3"}),
)
