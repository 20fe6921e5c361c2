"""Attention gets active tokens' queries alone, in long steps, and the keys of such alone where others leave none.

That graphs compute the same: test_attend_active_keys.py, test_route_attention.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.cleanup.attend_active_queries import AttendActiveQueriesPass
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from tests.graph_passes.golden_graphs import ROUTERS, source_text
from tests.graph_passes.harness import census, check_idempotence, run_model
from tests.graph_passes.test_skipping_profile import profiled_shapes

ROUTE = RouteLayersPass(ROUTERS, kind="layer")
COMPACT = LowerSkipToCompactionPass()
ATTENTION = "model.layers.0.self_attn.attention"
SOME = "model.layers.0.self_attn.attended_rows.queries.some"
EVERY = "model.layers.0.self_attn.attended_rows.queries.every.attention"


def _feeds(sequence: int) -> dict[str, np.ndarray]:
    """Two sequences of a step behind two tokens, of which the second one has less to see."""
    mask = np.ones((2, sequence + 2), np.int64)
    mask[1, :3] = 0
    return {
        "input_ids": np.random.default_rng(5).integers(0, 5, (2, sequence)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(2, sequence + 2), (2, 1)),
        "past_active.0": np.array([[True, False], [False, False]]),
        "past_key_values.0.key": np.array([0.3, -0.2, 0, 0] * 2, np.float32).reshape(2, 1, 2, 2),
        "past_key_values.0.value": np.array([0.5, 0.1, 0, 0] * 2, np.float32).reshape(2, 1, 2, 2),
    }


def _lowered(*passes: GraphPass) -> ir.Model:
    model = ir.from_onnx_text(source_text())
    next(node for node in model.graph if node.op_type == "Attention").name = ATTENTION  # for the profile
    for pass_ in passes:
        pass_(model)
    return model


@pytest.mark.parametrize("kind", ["layer", "attention-active", "attention"])
@pytest.mark.parametrize("sequence", [4, 8])
def test_attention_takes_what_the_sequence_with_most_active_tokens_has_when_a_step_is_long(
    sequence: int, kind: RoutingKind, tmp_path: Path
) -> None:
    model, feeds = _lowered(dataclasses.replace(ROUTE, kind=kind), COMPACT), _feeds(sequence)
    feeds = {name: array for name, array in feeds.items() if kind != "attention" or name != "past_active.0"}
    remembered = run_model(_lowered(ROUTE), _feeds(sequence))["present_active.0"]
    counts = remembered[:, 2:].sum(axis=1)
    assert 0 < counts.min() < counts.max() < sequence, "the sequences differ, and in both some tokens skip"
    before = run_model(model, feeds)
    assert AttendActiveQueriesPass(least=8)(model).modified
    for name, values in run_model(model, feeds).items():
        np.testing.assert_allclose(values, before[name], rtol=0, atol=1e-6, err_msg=name)
    shapes = profiled_shapes(model, feeds, tmp_path)
    check_idempotence(model, AttendActiveQueriesPass(least=8))
    if sequence < 8:
        assert shapes[ATTENTION][0][:2] == [2, sequence]
        assert not any(name.startswith(SOME) for name in shapes)
        return
    assert ATTENTION not in shapes
    if kind == "attention":
        assert shapes[f"{SOME}.attention"][0][:2] == [2, counts.max()]
        return
    keys = remembered.sum(axis=1).max()
    assert keys < sequence + 2
    assert shapes[f"{SOME}.attention"][0] == [2, 2, counts.max(), 2]
    assert shapes[f"{SOME}.hidden"][0] == [2, counts.max(), keys]


def test_attention_takes_all_queries_when_a_sequence_of_a_long_step_skips_nothing(tmp_path: Path) -> None:
    model, feeds = _lowered(ROUTE, COMPACT), _feeds(8)
    active = run_model(model, feeds)["present_active.0"][:, 2:]
    tokens = feeds["input_ids"]
    feeds["input_ids"] = np.stack([np.full(8, tokens[active][0]), tokens[1]])
    before = run_model(model, feeds)
    assert before["present_active.0"][0, 2:].all()
    assert not before["present_active.0"][1, 2:].all()
    assert AttendActiveQueriesPass(least=8)(model).modified
    for name, values in run_model(model, feeds).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    shapes = profiled_shapes(model, feeds, tmp_path)
    assert EVERY in shapes
    assert ATTENTION not in shapes
    assert not any(name.startswith(SOME) for name in shapes)


def test_branch_of_the_step_is_chosen_by_one_number_when_several_layers_ask() -> None:
    model = _lowered(dataclasses.replace(ROUTE, kind="attention"), COMPACT, AttendActiveQueriesPass())
    assert census(model, {"GreaterOrEqual": 0, "TopK": 0, "Attention": 0}) == {
        "GreaterOrEqual": 1,
        "TopK": 1,
        "Attention": 3,
    }


def test_all_keys_are_seen_when_something_else_reads_what_hides_some() -> None:
    model = _lowered(ROUTE, COMPACT)
    attention = next(node for node in model.graph.all_nodes() if node.op_type == "Attention")
    attention.graph.append(ir.node("Neg", [attention.inputs[3]]))  # type: ignore[union-attr]
    before = run_model(model, _feeds(8))
    assert AttendActiveQueriesPass(least=8)(model).modified
    assert census(model, {"GatherElements": 0, "TopK": 0}) == {"GatherElements": 0, "TopK": 1}
    for name, values in run_model(model, _feeds(8)).items():
        np.testing.assert_allclose(values, before[name], rtol=0, atol=1e-6, err_msg=name)


def _causal(attention: ir.Node) -> None:
    attention.attributes.add(ir.AttrInt64("is_causal", 1))


def _heads_apart(attention: ir.Node) -> None:
    attention.attributes.pop("q_num_heads")


def _read_twice(attention: ir.Node) -> None:
    attention.graph.append(ir.node("Neg", [attention.outputs[0]]))  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [_causal, _heads_apart, _read_twice])
def test_attention_is_left_alone_when_it_is_not_of_that_form(change: Callable[[ir.Node], None]) -> None:
    model = _lowered(ROUTE, COMPACT)
    change(next(node for node in model.graph.all_nodes() if node.op_type == "Attention"))
    assert not AttendActiveQueriesPass()(model).modified


@pytest.mark.parametrize("lowering", [LowerSkipToIfPass(), LowerSkipToCompactionPass(branches=False)])
def test_attention_is_left_alone_when_no_rows_are_gathered_in_a_branch(lowering: GraphPass) -> None:
    assert not AttendActiveQueriesPass()(_lowered(ROUTE, lowering)).modified
