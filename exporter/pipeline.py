"""The pass lists: every pass that ever runs, runs from here.

A list says what happens to a graph, in order, each line with its reason; at the border of a stage the graph is checked.
Nothing here knows what a source is: it gives a plain graph and says what is to be added to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import DloAdapter
from dlo_export.checkpoints.config import RoutingConfig
from dlo_export.checkpoints.model_types import ROUTED_BLOCKS
from dlo_export.graph_passes.cache.attend_active_slots import AttendActiveSlotsPass
from dlo_export.graph_passes.cache.grow_cache_outside_attention import GrowCacheOutsideAttentionPass
from dlo_export.graph_passes.cache.use_full_mask import UseFullMaskPass
from dlo_export.graph_passes.cache.use_group_query_attention import UseGroupQueryAttentionPass
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.attend_active_queries import AttendActiveQueriesPass
from dlo_export.graph_passes.cleanup.compute_norms_in_float32 import ComputeNormsInFloat32Pass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.cleanup.inline_functions import InlineFunctionsPass
from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.cleanup.keep_last_logits import KeepLastLogitsPass
from dlo_export.graph_passes.cleanup.lift_constants import LiftConstantsPass
from dlo_export.graph_passes.cleanup.multiply_tied_head import MultiplyTiedHeadPass
from dlo_export.graph_passes.cleanup.name_batch_dimension import NameBatchDimensionPass
from dlo_export.graph_passes.cleanup.name_logits import NameLogitsPass
from dlo_export.graph_passes.cleanup.name_uniquely import NameUniquelyPass
from dlo_export.graph_passes.cleanup.remove_identities import RemoveIdentitiesPass
from dlo_export.graph_passes.cleanup.remove_unused import RemoveUnusedPass
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.cleanup.state_cache_sizes import StateCacheSizesPass
from dlo_export.graph_passes.cleanup.use_matmul_nbits import UseMatMulNBitsPass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass, LayerInjection
from dlo_export.graph_passes.depth.remove_identity_layers import RemoveIdentityLayersPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.lowerings.add_plugin_functions import AddPluginFunctionsPass
from dlo_export.graph_passes.lowerings.record import LoweringRecord, Target, Workload
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.graph_passes.routing.decide_by_logits import DecideByLogitsPass
from dlo_export.graph_passes.routing.expose_hidden_states import ExposeHiddenStatesPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.fuse_router_gather import FuseRouterGatherPass
from dlo_export.graph_passes.routing.fuse_router_scores import FuseRouterScoresPass
from dlo_export.graph_passes.routing.keep_part import KeepPartPass
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass
from dlo_export.graph_passes.routing.reduce_router_products import ReduceRouterProductsPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.data_dependent_shapes import data_dependent_shapes
from dlo_export.graph_passes.spec.graph_checks import misordered_values
from dlo_export.graph_passes.spec.invariants import (
    INJECTED,
    PLAIN,
    ROUTED,
    Check,
    StageSpec,
    check_stage,
    released_stage,
)
from dlo_export.graph_passes.spec.layer_checks import unmasked_routing
from dlo_export.graph_passes.spec.ops import DOMAIN, MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import GraphPass, check_order
from dlo_export.runtimes.onnxruntime.operators import declared_by_onnxruntime


class GraphSource(Protocol):
    """What the pipeline asks of a source."""

    @property
    def adapter(self) -> DloAdapter | None:
        """The layers to inject, with their weights; None where the plain graph has all layers already."""
        ...

    @property
    def routing(self) -> RoutingConfig | None:
        """None where nothing is routed."""
        ...

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Layers of the deepened model that pass everything on and are to be left out."""
        ...

    @property
    def packs_weights(self) -> bool:
        """Whether matrices of its graph may be joined; somebody else's weights stay as they are, byte for byte."""
        ...

    def routers(self) -> dict[int, np.ndarray]:
        """Router weights by layer, float32 [hidden]."""
        ...

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        """The graph before any pass: a new one with every call."""
        ...


@dataclasses.dataclass(frozen=True)
class TensorRtOptions:
    """What a TensorRT graph is built for.

    Attributes:
        lowering: Name of what routed layers become, "none" where nothing is routed; "masked" is the oracle, which
            computes everything.
        cache: "static" has a fixed number of slots updated in place; "growing" keeps ONNX Runtime's interface.
        max_batch: Sequences per step at most.
        max_sequence: Tokens per sequence and step at most.
        max_cache: Slots of a static cache.
        last_logits: Compute the logits of each sequence's last token only; needs the static cache.
    """

    lowering: str
    cache: Literal["static", "growing"] = "static"
    max_batch: int = 4
    max_sequence: int = 512
    max_cache: int = 2048
    last_logits: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One entry of a pass list.

    Attributes:
        graph_pass: What runs.
        stage: What must hold afterwards.
        released: Whether layers are not looked for in the graph afterwards.
    """

    graph_pass: GraphPass
    stage: StageSpec
    released: bool = False


def foreign_passes(stand_ins: Iterable[str] = ()) -> list[GraphPass]:
    """What turns somebody else's graph into one whose layers can be found.

    Args:
        stand_ins: Names of its functions that stand in for operators of ONNX Runtime's own.
    """
    return [
        # Layers are found by operators, wherever an exporter drew the line of a function.
        InlineFunctionsPass(tuple(sorted(stand_ins))),
        # Weights are initializers of the main graph, also what was a Constant, the default of an input, or in a branch.
        LiftConstantsPass(),
        # Nobody has to look through them, however many there are.
        RemoveIdentitiesPass(),
        # What nothing reads would look like a fork of the stream, or be an input that nobody knows what to feed.
        RemoveUnusedPass(),
        # New nodes are named after old ones.
        NameUniquelyPass(),
        # Whoever runs a graph looks for its logits under one name, whatever a tool has made of it.
        NameLogitsPass(),
        # Additions that were fused with the norm behind them stand apart again: layers are found between two of them.
        SplitSkipNormsPass(),
    ]


def _masked_steps(source: GraphSource) -> list[Step]:
    """What every graph begins with: all its layers, and routing in its exact form."""
    return [
        # Deepen first: routers are numbered in the deepened model.
        *([Step(_inject_layers(source), INJECTED)] if _injects(source) else []),
        # On request, what passes everything on goes, with its cache; routers are numbered in what is left.
        *([Step(RemoveIdentityLayersPass(source.removed_layers), INJECTED)] if source.removed_layers else []),
        # Tokens that skip attention are hidden by its mask, which must say everything.
        *([Step(UseFullMaskPass(), INJECTED)] if _routes_attention(source) else []),
        # The masked form is exact standard ONNX, its routers in fp32, and the oracle for what follows.
        *([Step(_route_layers(source), ROUTED)] if source.routing is not None else []),
    ]


def onnxruntime_steps(
    source: GraphSource,
    lowering: LoweringRecord,
    target: Target,
    *,
    last_logits: bool = False,
    static_cache: int | None = None,
    compared_with: LoweringRecord | None = None,
) -> list[Step]:
    """What turns the plain graph into the one ONNX Runtime runs, in order, each step with its reason.

    Args:
        source: What is exported.
        lowering: What routed blocks become.
        target: What it is to run on.
        last_logits: Compute the logits of each sequence's last token only.
        static_cache: Slots of a cache that is written in place, per sequence; None lets it grow.
        compared_with: Of the graph that this one is held against: all around routed blocks is done as for that one.
    """
    around, routed = compared_with or lowering, source.routing is not None
    by_codes = routed and around.multiplies_by_codes
    decides = routed and lowering.make_pass is not None and target == "onnxruntime-cpu"
    gathers = decides and DOMAIN in lowering.domains
    masked, lowered = (
        dataclasses.replace(stage, domains=stage.domains | ({MICROSOFT} if by_codes else set()))
        for stage in (ROUTED if routed else INJECTED, lowering.stage)
    )
    cached = lowered if static_cache is None else _one_cache(lowered)
    every_norm = static_cache is not None and not routed
    return [
        # Runtimes make an empty cache by what its inputs say.
        Step(StateCacheSizesPass(), PLAIN),
        *_masked_steps(source),
        # In a branch, ONNX Runtime cannot fuse a weight's DequantizeLinear with the product itself.
        *([Step(UseMatMulNBitsPass(), masked)] if by_codes else []),
        # The head is the largest matrix, and its output larger: one row per sequence instead of one per prompt token.
        *([Step(KeepLastLogitsPass(), masked)] if last_logits and static_cache is None else []),
        # The one lowering: tokens that skip leave the MLP's batch, or the MLP runs only where a token is active.
        *_lowering_steps(lowering, Workload(), lowered),
        # Late: the fewer nodes the passes above meet the better. Decode gets 4 % faster.
        *([Step(FuseSiblingMatMulsPass(), lowered)] if source.packs_weights else []),
        # Rows of what is one product now are put in their places at once.
        *([Step(ScatterPackedRowsPass(), lowered)] if source.packs_weights else []),
        # Attention takes longer the more tokens are seen: in long steps, those that skip ask nothing.
        *([Step(AttendActiveQueriesPass(), lowered)] if source.packs_weights and static_cache is None else []),
        # Where query, key and value are one product shows only now.
        *([] if static_cache is None else [Step(UseGroupQueryAttentionPass(static_cache), cached)]),
        # Likewise; its operator takes the queries of all tokens.
        *([Step(AttendActiveSlotsPass(), cached)] if source.packs_weights and static_cache is not None else []),
        # Nothing is padded on such a cache: which is known only now.
        *([Step(KeepLastLogitsPass(), cached)] if last_logits and static_cache is not None else []),
        # One token's logits may be copied.
        *([] if last_logits else _head_steps(cached, target)),
        # transformers.js and optimum know the batch by its dimension's name.
        Step(NameBatchDimensionPass(), cached),
        # Last, since layers are not found behind it: additions that somebody had fused with their norms are so again;
        # all of them where genai's graph, which has one cache too, has them so.
        Step(JoinSkipNormsPass(around.fuses_norms, every=every_norm), cached, released=True),
        # Where the library is needed anyway, and behind the norms, whose outputs rows are gathered of.
        *([Step(FuseRouterGatherPass(), cached, released=True)] if gathers else []),
        # Behind all that read the form routing writes: in decode, a router costs what its operators do, and what they
        # read. The masked form stays as the rule is written, for others to be held against.
        *([Step(MultiplyRouterRowsPass(), cached, released=True)] if decides else []),
        *([Step(DecideByLogitsPass(), cached, released=True)] if decides else []),
    ]


def captured_steps(
    source: GraphSource,
    lowering: LoweringRecord,
    max_cache: int,
    target: Target,
    *,
    fuse_routers: bool = True,
) -> list[Step]:
    """What turns the plain graph into one whose step a CUDA graph captures in ONNX Runtime, each step with its reason.

    Args:
        source: What is exported.
        lowering: One that a CUDA graph can capture.
        max_cache: Slots of the cache, per sequence.
        target: What it is to run on.
        fuse_routers: Let the dlo operators' library compute routers' scores too, where it is needed anyway.
    """
    fused = fuse_routers and DOMAIN in lowering.domains
    steps = [
        *_masked_steps(source),
        # The one lowering, of fixed shapes.
        *_lowering_steps(lowering, Workload(plugins_at_hand=True)),
        # Each kernel of a step costs a microsecond or two, whatever it does.
        *([Step(FuseRouterScoresPass(), lowering.stage)] if fused else []),
        # One product for query, key and value, which attention takes as it is.
        Step(FuseSiblingMatMulsPass(), lowering.stage),
        *_head_steps(lowering.stage, target),
    ]
    stage = _one_cache(lowering.stage, data_dependent_shapes)
    return [
        *steps,
        # A cache at fixed addresses. Last: where query, key and value are one product shows only now.
        Step(UseGroupQueryAttentionPass(max_cache, captured=True), stage),
        # A norm takes longer than the operator that adds first; each kernel of a step costs a microsecond or two.
        Step(JoinSkipNormsPass(every=True), stage, released=True),
    ]


def _one_cache(stage: StageSpec, *checks: Check) -> StageSpec:
    """What is legal where past and present are one buffer, and attention is ONNX Runtime's own.

    So of a layer that is masked whole, the masked form is not found any more; what a lowering promises still holds.
    """
    return dataclasses.replace(
        stage,
        name=f"{stage.name}, one cache",
        layer_checks=tuple(check for check in stage.layer_checks if check is not unmasked_routing),
        domains=stage.domains | {MICROSOFT},
        checks=(*stage.checks, *checks),
    )


def tensorrt_steps(source: GraphSource, options: TensorRtOptions) -> list[Step]:
    """What turns the plain graph into the one TensorRT builds, in order, each step with its reason."""
    routed, static = source.routing is not None, options.cache == "static"
    stage = ROUTED if routed else INJECTED
    workload = Workload(max_batch=options.max_batch, max_sequence=options.max_sequence)
    return [
        *_masked_steps(source),
        # A float32 MatMul may run in TF32, and not at all on Turing.
        *([Step(ReduceRouterProductsPass(), stage)] if routed else []),
        # TensorRT builds no attention with a cache of its own, and updates a static one in place.
        Step(UseStaticCachePass(options.max_cache) if static else GrowCacheOutsideAttentionPass(), stage),
        # The mean of squares overflows fp16 and is too coarse in bf16.
        Step(ComputeNormsInFloat32Pass(), stage),
        # The head is the largest matrix: one row per sequence instead of one per prompt token.
        *([Step(KeepLastLogitsPass(), stage)] if options.last_logits else []),
        # The one lowering.
        *_lowering_steps(find_lowering(options.lowering, "tensorrt"), workload),
    ]


def twin_steps(options: TensorRtOptions) -> list[Step]:
    """What turns TensorRT's graph, in fp32, into one that ONNX Runtime runs on the weights of model.onnx."""
    stage = find_lowering(options.lowering, "tensorrt").stage
    return [
        # As in model.onnx, so that the weights are the same.
        Step(FuseSiblingMatMulsPass(), stage),
        # ONNX Runtime has no plugins: it runs their bodies in standard operators.
        Step(AddPluginFunctionsPass(), stage),
    ]


def exposure_passes(*, routed: bool, force: bool, streams: bool) -> list[GraphPass]:
    """What shows the inside of a released graph to parity; such a graph is never released.

    Args:
        routed: Whether the graph has routers.
        force: Take the routers' decisions from inputs.
        streams: Give out the residual stream behind every layer.
    """
    return [
        # Layers are found between additions.
        SplitSkipNormsPass(),
        # Scores, and on request the decisions, which candidates must be able to share.
        *([ExposeRoutingPass(force=force)] if routed else []),
        # To name the first layer that diverges.
        *([ExposeHiddenStatesPass()] if streams else []),
    ]


def run_steps(model: ir.Model, steps: list[Step]) -> ir.Model:
    """Runs a pass list on a model, in place, and checks it at every border.

    Raises:
        dlo_export.graph_passes.errors.GraphPassError: The graph (a foreign one) is not what a pass needs.
        dlo_export.graph_passes.spec.invariants.GraphInvariantError: A stage broke its promise: a bug.
    """
    check_order([step.graph_pass for step in steps])
    checked: StageSpec | None = None
    for step in steps:
        stage = released_stage(step.stage) if step.released else step.stage
        # A pass that found nothing to do leaves what was found legal just before.
        if step.graph_pass(model).modified or stage != checked:
            check_stage(model, stage)
        checked = stage
    return model


def prepare_foreign(model: ir.Model) -> ir.Model:
    """Makes the layers of somebody else's graph findable, in place; whether it has any is not asked here.

    Raises:
        dlo_export.graph_passes.errors.GraphPassError: Its nodes are in a cycle or out of order.
    """
    if problems := list(misordered_values(model.graph)):
        raise GraphPassError(
            "the nodes cannot be run in the order they are in:\n  " + "\n  ".join(problems),
            hint="export the graph again: ONNX lists a node behind those whose outputs it reads",
        )
    return _run_passes(model, foreign_passes(_stand_ins(model)))


def _stand_ins(model: ir.Model) -> list[str]:
    """Names of functions that ONNX Runtime has operators for; none of those whose constants lie in data files."""

    def is_external(node: ir.Node) -> bool:
        tensors = (each for each in node.attributes.values() if each.type == ir.AttributeType.TENSOR)
        return any(isinstance(each.value, ir.ExternalTensor) for each in tensors)

    return [
        function.name
        for function in model.functions.values()
        if declared_by_onnxruntime(function.domain, function.name) is not None
        and not any(map(is_external, function.all_nodes()))
    ]


def state_cache_sizes(model: ir.Model) -> ir.Model:
    """Has a graph say how wide its cache is, in place, where nothing else is done to it: runners ask its inputs."""
    return _run_passes(model, [StateCacheSizesPass()])


def prepare_released(model: ir.Model) -> ir.Model:
    """Makes the layers of a released graph findable, in place."""
    return _run_passes(model, exposure_passes(routed=False, force=False, streams=False))


def exposed(released: ir.Model, *, force: bool = False, streams: bool = False) -> ir.Model:
    """A copy of a released graph that shows what is inside.

    Args:
        released: Left as it is.
        force: Take the routers' decisions from inputs.
        streams: Give out the residual stream behind every layer.
    """
    # Serialising and reading back is the deepest copy there is; weights are external and stay where they are.
    model = ir.from_proto(ir.to_proto(released))
    routed = bool(find_routers(model.graph))
    join = JoinSkipNormsPass.of(model)
    passes = exposure_passes(routed=routed, force=force, streams=streams)
    # What is shown must round as what is released does: a fused norm has its own way.
    return _run_passes(model, [*passes, *([join] if join is not None else [])])


def exposed_part(released: ir.Model, part: int) -> ir.Model:
    """A part of a released graph, which takes the routers' decisions and shows their scores.

    Args:
        released: Left as it is.
        part: 0 is the embedding, then come the layers, then the head.

    Raises:
        dlo_export.graph_passes.errors.GraphPassError: The graph cannot be cut there.
    """
    model = ir.from_proto(ir.to_proto(released))
    routed = bool(find_routers(model.graph))
    # Last, since it leaves one layer, which nothing else is to be looked for in.
    return _run_passes(model, [*exposure_passes(routed=routed, force=routed, streams=False), KeepPartPass(part)])


def _run_passes(model: ir.Model, passes: list[GraphPass]) -> ir.Model:
    check_order(passes)
    for graph_pass in passes:
        graph_pass(model)
    return model


def _lowering_steps(lowering: LoweringRecord, workload: Workload, stage: StageSpec | None = None) -> list[Step]:
    return [] if lowering.make_pass is None else [Step(lowering.make_pass(workload), stage or lowering.stage)]


def _routes_attention(source: GraphSource) -> bool:
    return source.routing is not None and "self_attn" in ROUTED_BLOCKS[source.routing.kind]


def _head_steps(stage: StageSpec, target: Target) -> list[Step]:
    # On a CPU, copying a prompt's logits takes as long as half of its norms and additions.
    return [Step(MultiplyTiedHeadPass(), stage)] if target == "onnxruntime-cpu" else []


def _injects(source: GraphSource) -> bool:
    return source.adapter is not None and bool(source.adapter.injected_layers)


def _inject_layers(source: GraphSource) -> InjectLayersPass:
    adapter = source.adapter
    assert adapter is not None, "only an adapter injects; a deepened checkpoint has its layers already"
    return InjectLayersPass(
        tuple(
            LayerInjection(layer.position, layer.source, adapter.layer_tensors(layer.position))
            for layer in adapter.injected_layers
        )
    )


def _route_layers(source: GraphSource) -> RouteLayersPass:
    assert source.routing is not None, "asked before"
    return RouteLayersPass(
        source.routers(),
        rescale=source.routing.rescale,
        scale_factor=source.routing.scale_factor,
        scale_gap=source.routing.scale_gap,
        kind=source.routing.kind,
        thresholds=source.routing.thresholds,
    )
