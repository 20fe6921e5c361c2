from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.registry import lowering_records
from dlo_export.graph_passes.spec import graph_checks
from dlo_export.graph_passes.spec.invariants import INJECTED, PLAIN, ROUTED, GraphInvariantError, check_stage
from tests.graph_passes import golden_graphs

LOWERED = {r.stage.name.removeprefix("lowered by "): r.stage for r in lowering_records() if r.make_pass is not None}
STAGES = {"plain": PLAIN, "injected": INJECTED, "routed": ROUTED, **LOWERED}


def _plain() -> ir.Model:
    return ir.from_onnx_text(golden_graphs.source_text())


@pytest.mark.parametrize(
    ("golden", "stages"),
    [
        ("inject_layers", ("injected", "routed", *LOWERED)),
        ("route_layers", ("routed",)),
        ("lower_skip_to_compaction", ("LowerSkipToCompactionPass",)),
        ("lower_skip_to_if", ("LowerSkipToIfPass",)),
        ("lower_skip_to_topk", ("LowerSkipToTopKPass",)),
        ("lower_skip_to_plugin", ("LowerSkipToPluginPass",)),
        ("fuse_sibling_matmuls", ("injected", "routed", *LOWERED)),
    ],
)
def test_graph_is_legal_only_at_its_stages_when_a_pass_made_it(golden: str, stages: tuple[str, ...]) -> None:
    for name, stage in STAGES.items():
        if name in stages:
            check_stage(golden_graphs.golden_graph(golden), stage)
        else:
            with pytest.raises(GraphInvariantError, match=f"after stage '{stage.name}'"):
                check_stage(golden_graphs.golden_graph(golden), stage)


def test_all_violations_are_reported_when_a_graph_breaks_many() -> None:
    model = _plain()
    graph = model.graph
    graph.inputs.append(ir.Value(name="unread", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])))
    graph.register_initializer(
        ir.Value(name="unread_weight", const_value=ir.tensor(np.zeros(2, np.float32), name="unread_weight"))
    )
    graph.outputs.pop()
    last = graph[len(graph) - 1]
    graph.remove(last)
    graph.insert_before(graph[0], last)
    last.domain = "dlo"
    with pytest.raises(GraphInvariantError) as error:
        check_stage(model, PLAIN)
    for violation in (
        "graph input 'unread' has no consumer",
        "initializer 'unread_weight' has no consumer",
        "reads 'model.norm' before it is computed",
        "is of domain 'dlo'",
        "expected 'present.0.value'",
        "please report it",
    ):
        assert violation in str(error.value)


def test_foreign_graph_is_blamed_on_its_source_when_it_is_broken_from_the_start() -> None:
    model = _plain()
    model.producer_name = "pytorch"
    model.graph[0].domain = "com.microsoft"
    with pytest.raises(GraphPassError, match="the source graph cannot be used") as error:
        check_stage(model, PLAIN)
    assert "domain" not in str(error.value), "a foreign graph may use its own domains"


def test_names_and_branches_are_checked_when_graph_is_legal_otherwise() -> None:
    model = _plain()
    values = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    values["model.rotary_emb.sin"].name = "model.rotary_emb.cos"
    with pytest.raises(GraphInvariantError, match=r"name 'model\.rotary_emb\.cos' is given to 2 values"):
        check_stage(model, PLAIN)


def test_branch_outputs_must_be_computed_inside_their_branch() -> None:
    model = _plain()
    graph = model.graph
    logits = graph.outputs[0]
    source = logits.producer()
    assert source is not None
    forwarding = ir.Graph([], [source.inputs[0]], nodes=[], name="then")
    computing = ir.node("Identity", [source.inputs[0]], name="inner")
    computing.outputs[0].name = "inner"
    other = ir.Graph([], [computing.outputs[0]], nodes=[computing], name="else")
    graph.append(ir.node("If", [graph.inputs[0]], {"then_branch": forwarding, "else_branch": other}, name="choice"))
    found = list(graph_checks.foreign_branch_outputs(graph))
    assert found == ["output 'model.norm' of subgraph 'then' is not computed inside it"]
