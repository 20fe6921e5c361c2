from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass, LayerInjection
from dlo_export.graph_passes.errors import DecoderLayersNotFound, GraphPassError
from dlo_export.graph_passes.find.data_flow import subgraphs_of
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import RECORD, LowerSkipToIfPass
from dlo_export.graph_passes.routing.expose_hidden_states import ExposeHiddenStatesPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec import graph_checks, layer_checks
from dlo_export.graph_passes.spec.invariants import ROUTED, GraphInvariantError, check_stage
from dlo_export.graph_passes.spec.pass_contract import check_order
from dlo_export.graph_passes.spec.provenance import role_values
from tests.graph_passes import golden_graphs
from tests.graph_passes.graphs import MLP, masked_decoder, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import Arrays, check_idempotence, check_pass, check_refused, make_session, run_model
from tests.graph_passes.injections import injection_pass

ROUTER = np.array([0.7, -0.9], np.float32)
DECISIONS = {
    "mixed": np.array([[True, False, True], [False, False, True]]),
    "one_sample": np.array([[False, False, False], [False, True, False]]),
    "all": np.ones((2, 3), bool),
    "none": np.zeros((2, 3), bool),
}
BEFORE = {"If": 0, "Where": 1, "Add": 2, "MatMul": 2, "Identity": 1, "ReduceMax": 0, "Cast": 0}
AFTER = {**BEFORE, "If": 1, "Identity": 2, "ReduceMax": 1, "Cast": 2}
SCALED = "column2 = Unsqueeze (scale, last)\n  e = Mul (d, column2)\n  m = Where (column, e, zero)"


def _feeds(active: np.ndarray, **more: np.ndarray) -> Arrays:
    return {**tiny_feeds(), "active": active, **more}


def _conditionals(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "If"]


@pytest.mark.parametrize("active", DECISIONS.values(), ids=DECISIONS)
def test_conditional_equals_the_mask_when_active_tokens_are(active: np.ndarray) -> None:
    model = check_pass(masked_decoder(), LowerSkipToIfPass(), BEFORE, AFTER, _feeds(active))
    main = {node.op_type for node in model.graph}
    assert not main & {"RMSNormalization", "MatMul", "Sigmoid", "Where", "Unsqueeze"}, "all of the block is inside"
    assert list(_conditionals(model.graph)[0].outputs[0].shape) == ["B", "S", 2]


@pytest.mark.parametrize(("opset", "casts"), [(19, 2), (20, 0)])
def test_decisions_are_reduced_as_they_are_when_the_opset_can(opset: int, casts: int) -> None:
    text = masked_decoder(MLP.replace("RMSNormalization", "Mul"), opset=opset)
    for active in DECISIONS.values():
        check_pass(text, LowerSkipToIfPass(reduce_bool=True), BEFORE, {**AFTER, "Cast": casts}, _feeds(active))


@pytest.mark.parametrize("active", DECISIONS.values(), ids=DECISIONS)
def test_conditional_takes_the_scale_inside_when_branch_is_scaled_per_token(active: np.ndarray) -> None:
    text = masked_decoder(select=SCALED, inputs=", float[B,S] scale")
    feeds = _feeds(active, scale=np.arange(6, dtype=np.float32).reshape(2, 3))
    model = check_pass(text, LowerSkipToIfPass(), {**BEFORE, "Unsqueeze": 2}, {**AFTER, "Unsqueeze": 2}, feeds)
    assert "Unsqueeze" not in {node.op_type for node in model.graph}


def test_unsqueezed_decision_stays_outside_when_something_else_reads_it() -> None:
    text = masked_decoder(outputs=", bool[B,S,1] shown").replace("logits =", "shown = Not (column)\n  logits =")
    model = check_pass(text, LowerSkipToIfPass(), BEFORE, AFTER, _feeds(DECISIONS["mixed"]))
    assert "Unsqueeze" in {node.op_type for node in model.graph}


def test_skipped_stream_is_cast_as_the_addition_is_when_norm_and_addition_share_a_cast() -> None:
    mlp = "c = Cast <to = 11> (h)\n  k = Cast <to = 1> (c)\n  " + MLP.replace("(h, norm)", "(k, norm)")
    text = masked_decoder(mlp).replace("Add (h, m)", "Add (k, m)")
    for active in DECISIONS.values():
        before, after = {**BEFORE, "Cast": 2}, {**AFTER, "Cast": 6}
        check_pass(text, LowerSkipToIfPass(), before, after, _feeds(active))


def test_tokens_may_be_mixed_in_the_branch_because_all_of_them_run() -> None:
    text = masked_decoder(MLP.replace("a = Sigmoid (u)", "a = Softmax <axis = 1> (u)"))
    for active in DECISIONS.values():
        check_pass(text, LowerSkipToIfPass(), BEFORE, AFTER, _feeds(active))


NEAR_MISSES = {
    "not_routed": (tiny_decoder(), "none of the 1 decoder layers is routed"),
    "selects_one": (
        masked_decoder(select="m = Where (column, d, something)", initializers=", float something = {1}"),
        "does not select zero",
    ),
    "keeps_skipped": (masked_decoder(select="m = Where (column, zero, d)"), "does not select zero"),
    "wrong_axis": (masked_decoder().replace("(active, last)", "(active, first)").replace(
        "float zero", "int64[1] first = {0}, float zero"), "its condition is not Unsqueeze"),
    "reads_layer_input": (masked_decoder(MLP.replace("(a, down)", "(b, down)").replace(
        "d = ", "b = Mul (a, xa)\n  d = ").replace("n = ", "xa = MatMul (x, up)\n  n = ")), "not the stream after"),
    "used_elsewhere": (masked_decoder(outputs=", float[B,S,2] d"), "is used elsewhere, by the graph's outputs"),
    "mask_used_elsewhere": (masked_decoder(outputs=", float[B,S,2] m"), "is used elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_lowering_refuses_with_the_reason_when_graph_is_no_masked_mlp(text: str, reason: str) -> None:
    check_refused(text, LowerSkipToIfPass(), reason)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (LowerSkipToIfPass(), LowerSkipToCompactionPass(), "layer 0: If node 'model.layers.0.mlp.if' skips its MLP"),
        (LowerSkipToCompactionPass(), LowerSkipToIfPass(), "none of the 1 decoder layers is routed"),
    ],
)
def test_second_lowering_is_refused_when_graph_is_lowered(
    first: ir.passes.PassBase, second: ir.passes.PassBase, reason: str
) -> None:
    model = ir.from_onnx_text(masked_decoder())
    first(model)
    with pytest.raises(GraphPassError, match=reason):
        second(model)


RESCALES = {"rescaled": {"rescale": True, "scale_factor": 2.0, "scale_gap": 0.5}, "unscaled": {}}


def _llama() -> ir.Model:
    model = ir.from_onnx_text(golden_graphs.source_text())
    for node in model.graph:  # the text names values only
        node.name = node.outputs[0].name
    return model


def _two_layer_llama() -> ir.Model:
    model = _llama()
    injection_pass(model, [(1, 0)], "random")(model)
    return model


def _llama_feeds(model: ir.Model, batch: int = 2, sequence: int = 4, past: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, past + sequence), np.int64)
    mask[0, :2] = 0
    return {
        "input_ids": rng.integers(0, 5, (batch, sequence)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, past + sequence), (batch, 1)),
        **{
            value.name: rng.standard_normal((batch, 1, past, 2)).astype(np.float32)
            for value in model.graph.inputs
            if value.name.startswith("past_key_values")
        },
    }


@pytest.mark.parametrize("scale", RESCALES.values(), ids=RESCALES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 4)])
def test_lowered_llama_equals_the_masked_one_when_decisions_are(
    scale: dict[str, float], layers: int, batch: int, sequence: int
) -> None:
    masked = _llama() if layers == 1 else _two_layer_llama()
    routers = {layer: np.array([0.8, -0.4, 0.3, 0.9], np.float32) for layer in range(layers)}
    RouteLayersPass(routers, **scale)(masked)
    lowered = ir.from_proto(ir.to_proto(masked))
    assert LowerSkipToIfPass()(lowered).modified
    check_stage(lowered, RECORD.stage)
    check_idempotence(lowered, LowerSkipToIfPass())
    free, feeds = run_model(masked, _llama_feeds(masked, batch, sequence)), _llama_feeds(masked, batch, sequence)
    _assert_equal(run_model(lowered, feeds), free)
    for model in (masked, lowered):
        ExposeRoutingPass(force=True)(model)
    some = np.arange(batch * sequence).reshape(batch, sequence) % 3 == 1
    for decisions in itertools.product((some, np.zeros_like(some), np.ones_like(some)), repeat=layers):
        forced = {f"force_active.{layer}": decision for layer, decision in enumerate(decisions)}
        _assert_equal(run_model(lowered, {**feeds, **forced}), run_model(masked, {**feeds, **forced}))


def _assert_equal(outputs: Arrays, expected: Arrays) -> None:
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name], array, rtol=0, atol=1e-6, err_msg=name)


def test_names_are_unique_and_carry_the_layer_when_two_layers_are_lowered() -> None:
    model = _two_layer_llama()
    RouteLayersPass(dict.fromkeys(range(2), golden_graphs.ROUTERS[0]))(model)
    LowerSkipToIfPass()(model)
    nodes = list(model.graph.all_nodes())
    for names in ([node.name for node in nodes], [output.name for node in nodes for output in node.outputs]):
        assert len(set(names)) == len(names)
    conditionals = _conditionals(model.graph)
    assert [node.name for node in conditionals] == ["model.layers.0.mlp.if", "model.layers.1.mlp.if"]
    for index, conditional in enumerate(conditionals):
        for branch in subgraphs_of(conditional):
            assert not branch.initializers, "weights stay in the main graph"
            assert {node.metadata_props.get("dlo.layer", str(index)) for node in branch} == {str(index)}
            assert all(output.producer() in set(branch) for output in branch.outputs)
            assert [(output.dtype, output.shape) for output in branch.outputs] == [
                (ir.DataType.FLOAT, conditional.outputs[0].shape)
            ]
        then_branch = conditional.attributes["then_branch"].as_graph()
        assert all(f".{index}." in node.name for node in then_branch)


def test_layers_and_projections_are_found_when_graph_is_lowered() -> None:
    model = _two_layer_llama()
    before = [layer.projections.keys() for layer in find_decoder_layers(model.graph)]
    RouteLayersPass({1: golden_graphs.ROUTERS[0]})(model)
    LowerSkipToIfPass()(model)
    layers = find_decoder_layers(model.graph)
    assert [layer.projections.keys() for layer in layers] == before
    assert [layer.mlp.conditional is not None for layer in layers] == [False, True]
    assert layers[1].mlp.nodes[0].graph is layers[1].mlp.conditional.attributes["then_branch"].as_graph()


def test_forced_decisions_reach_the_branches_when_routing_is_exposed_after_a_round_trip() -> None:
    model = ir.from_onnx_text(tiny_decoder())
    dense = run_model(model, tiny_feeds())
    RouteLayersPass({0: ROUTER})(model)
    LowerSkipToIfPass()(model)
    model = ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))
    ExposeRoutingPass(force=True)(model)
    ExposeHiddenStatesPass()(model)
    assert not role_values(model.graph, "router_active"), "no decision of the graph's own is left"
    for active in DECISIONS.values():
        outputs = run_model(model, {**tiny_feeds(), "force_active.0": active})
        differs = np.abs(outputs["logits"] - dense["logits"]).max(axis=-1) > 1e-6
        np.testing.assert_array_equal(differs, ~active)
        np.testing.assert_array_equal(outputs["hidden.0"], outputs["logits"])
        assert outputs["router_scores.0"].shape == active.shape
    check_idempotence(model, ExposeRoutingPass(force=True))
    check_idempotence(model, ExposeHiddenStatesPass())


@pytest.mark.parametrize("minimum", [2, 3])
def test_fusion_of_siblings_changes_nothing_when_it_runs_before_or_after(minimum: int) -> None:
    fuse, lower = FuseSiblingMatMulsPass(minimum), LowerSkipToIfPass()
    expected = None
    for steps in ([lower], [fuse, lower], [lower, fuse]):
        check_order(steps)
        model = _llama()
        RouteLayersPass(golden_graphs.ROUTERS)(model)
        for step in steps:
            assert step(model).modified
        check_stage(model, RECORD.stage)
        outputs = run_model(model, _llama_feeds(model))
        expected = expected or outputs
        _assert_equal(outputs, expected)


def _profiled_nodes(model: ir.Model, feeds: Arrays, folder: Path) -> set[str]:
    """Names of the nodes whose kernels ran, in one run without graph optimisation."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = make_session(model, options=options)
    session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    suffix = "_kernel_time"
    return {event["name"].removesuffix(suffix) for event in events if event["name"].endswith(suffix)}


@pytest.mark.parametrize("active_layers", [(), (0,), (1,), (0, 1)])
def test_no_node_of_an_mlp_runs_when_no_token_is_active(active_layers: tuple[int, ...], tmp_path: Path) -> None:
    model = _two_layer_llama()
    RouteLayersPass(dict.fromkeys(range(2), golden_graphs.ROUTERS[0]), **RESCALES["rescaled"])(model)
    LowerSkipToIfPass()(model)
    ExposeRoutingPass(force=True)(model)
    branches = [conditional.attributes["then_branch"].as_graph() for conditional in _conditionals(model.graph)]
    inside = [{node.name for node in branch} for branch in branches]
    outside = {node.name for node in model.graph}
    decision = np.zeros((2, 4), bool)
    forced = {f"force_active.{layer}": decision.copy() for layer in range(2)}
    for layer in active_layers:
        forced[f"force_active.{layer}"][1, 2] = True
    ran = _profiled_nodes(model, {**_llama_feeds(model), **forced}, tmp_path)
    assert outside <= ran, "all nodes of the main graph run, so the profile is complete"
    for layer, names in enumerate(inside):
        assert len(names) >= 10
        assert names & ran == (names if layer in active_layers else set()), f"layer {layer}"


def _lowered_llama() -> ir.Model:
    model = _llama()
    RouteLayersPass(golden_graphs.ROUTERS)(model)
    LowerSkipToIfPass()(model)
    return model


def _eager_branches(graph: ir.Graph) -> list[str]:
    return list(layer_checks.eager_branches(graph, find_decoder_layers(graph)))


def test_branch_is_reported_as_eager_when_part_of_its_mlp_is_outside() -> None:
    model = _lowered_llama()
    graph, conditional = model.graph, _conditionals(model.graph)[0]
    assert not _eager_branches(graph)
    branch = conditional.attributes["then_branch"].as_graph()
    first = list(branch)[:2]
    branch.remove(first)
    graph.insert_before(conditional, first)
    where = "of the MLP is computed outside If node 'model.layers.0.mlp.if'"
    assert _eager_branches(graph) == [
        f"layer 0: RMSNormalization node 'model.layers.0.post_attention_layernorm' {where}",
        f"layer 0: MatMul node 'model.layers.0.mlp.gate_proj' {where}",
    ]


def test_branch_is_reported_when_it_holds_a_weight() -> None:
    model = _lowered_llama()
    weight = model.graph.initializers.pop("model.layers.0.mlp.up_proj.weight")
    _conditionals(model.graph)[0].attributes["then_branch"].as_graph().register_initializer(weight)
    (violation,) = _eager_branches(model.graph)
    assert violation.startswith("layer 0: initializer 'model.layers.0.mlp.up_proj.weight' stands inside If node")


def test_values_inside_branches_are_checked_when_graph_is_legal_otherwise() -> None:
    model = _lowered_llama()
    assert not list(graph_checks.broken_values(model.graph))
    branch = _conditionals(model.graph)[0].attributes["then_branch"].as_graph()
    first, last = branch[0], branch[len(branch) - 1]
    first.outputs[0].name = "logits"
    assert list(graph_checks.broken_values(model.graph)) == ["name 'logits' is given to 2 values"]
    branch.remove(last)
    branch.insert_before(first, last)
    assert any("before it is computed" in violation for violation in graph_checks.broken_values(model.graph))


def test_routed_stage_is_refused_when_layer_is_lowered() -> None:
    model = _lowered_llama()
    with pytest.raises(GraphInvariantError, match="was made by LowerSkipToIfPass") as error:
        check_stage(model, ROUTED)
    assert "layer 0: If node 'model.layers.0.mlp.if' skips its MLP branch already" in str(error.value)


@pytest.mark.parametrize(
    "pass_", [RouteLayersPass({0: ROUTER}), InjectLayersPass((LayerInjection(1, 0, {}),))], ids=["route", "inject"]
)
def test_earlier_passes_are_refused_when_somebody_elses_mask_is_lowered(pass_: ir.passes.PassBase) -> None:
    model = ir.from_onnx_text(masked_decoder())
    LowerSkipToIfPass()(model)
    with pytest.raises(GraphPassError, match="LowerSkipToIfPass ran before, expected after it"):
        pass_(model)


def test_stream_is_lost_when_a_conditional_does_not_pass_it_on() -> None:
    model = _lowered_llama()
    (conditional,) = _conditionals(model.graph)
    identity = next(iter(conditional.attributes["else_branch"].as_graph()))
    stream = identity.inputs[0]
    identity.replace_input_with(0, stream.producer().inputs[1])
    with pytest.raises(DecoderLayersNotFound, match=f"value '{stream.name}' of the residual stream is read inside"):
        find_decoder_layers(model.graph)
