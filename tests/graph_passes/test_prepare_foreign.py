"""The passes that make another exporter's graph one of the form that all others read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.inline_functions import InlineFunctionsPass
from dlo_export.graph_passes.cleanup.lift_constants import LiftConstantsPass
from dlo_export.graph_passes.cleanup.name_logits import NameLogitsPass
from dlo_export.graph_passes.cleanup.name_uniquely import NameUniquelyPass
from dlo_export.graph_passes.cleanup.remove_unused import RemoveUnusedPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.spec.provenance import shared_constant
from tests.graph_passes.harness import as_text, check_idempotence, check_pass, run_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
FEEDS = {"x": np.array([1, -2], np.float32)}

CONSTANTS = f"""{HEADER}
g (float[2] x) => (float[2] y) <bool yes = {{1}}> {{
  w = Constant <value = float[2] {{3, 4}}> ()
  s = Mul (x, w)
  y = If (yes) <
    then_branch = t () => (float[2] a) <float[2] v = {{5, 6}}> {{ a = Add (s, v) }},
    else_branch = e () => (float[2] b) {{ b = Constant <value = float[2] {{7, 8}}> () }}
  >
}}"""


def test_lift_makes_initializers_of_constants_wherever_they_stand() -> None:
    before, after = {"Constant": 2, "Identity": 0}, {"Constant": 0, "Identity": 1}
    model = check_pass(CONSTANTS, LiftConstantsPass(minimum_bytes=8), before, after, FEEDS)
    assert len(model.graph.initializers) == 4
    assert not any(subgraph.initializers for subgraph in model.graph.subgraphs())


def test_lift_leaves_constants_alone_when_they_are_small() -> None:
    model = ir.from_onnx_text(CONSTANTS)
    LiftConstantsPass()(model)
    assert [node.op_type for node in model.graph.all_nodes()].count("Constant") == 2
    assert not any(subgraph.initializers for subgraph in model.graph.subgraphs())


def test_lift_fixes_the_default_when_an_input_has_one() -> None:
    text = f"{HEADER} g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {{3, 4}}> {{ y = Mul (x, w) }}"
    model = ir.from_onnx_text(text)
    assert LiftConstantsPass()(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run_model(model, FEEDS)["y"], [3, -8])
    check_idempotence(model, LiftConstantsPass())


def test_remove_takes_inputs_nodes_and_initializers_that_nothing_reads() -> None:
    text = f"""{HEADER}
    g (float[2] x, float[2] unused) => (float[2] y) <float[2] w = {{3, 4}}, float[2] left = {{0, 0}}> {{
      first = Neg (x)
      second = Add (first, left)
      y = Mul (x, w)
    }}"""
    model = ir.from_onnx_text(text)
    assert RemoveUnusedPass()(model).modified
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w"]
    check_idempotence(model, RemoveUnusedPass())


def test_names_are_unique_when_nodes_had_none_and_a_branch_hid_a_value() -> None:
    text = f"""{HEADER}
    g (float[2] x) => (float[2] y) <bool yes = {{1}}> {{
      h = Neg (x)
      z = Neg (h)
      y = If (yes) <
        then_branch = t () => (float[2] h) {{ h = Add (x, z) }},
        else_branch = e () => (float[2] h) {{ h = Identity (x) }}
      >
    }}"""
    # The text itself names no node; ONNX's checker refuses the hidden value, so there is nothing to compare with.
    model = ir.from_onnx_text(text)
    assert NameUniquelyPass()(model).modified
    nodes = [node.name for node in model.graph.all_nodes()]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    np.testing.assert_array_equal(run_model(model, FEEDS)["y"], [2, -4])
    check_idempotence(model, NameUniquelyPass())


def test_value_makes_way_when_it_has_the_name_of_a_cache_to_come() -> None:
    text = f"{HEADER} g (float[2] x) => (float[2] y) {{ present.7.key = Neg (x)  y = Neg (present.7.key) }}"
    text = text.replace("present.7.key", "seven")
    model = ir.from_onnx_text(text)
    next(iter(model.graph)).outputs[0].name = "present.7.key"
    NameUniquelyPass()(model)
    assert next(iter(model.graph)).outputs[0].name == "present.7.key.inner"


FUNCTIONS = """<ir_version: 10, opset_import: ["" : 21, "custom" : 1]>
g (float[2] x) => (float[2] y) { h = custom.twice (x)  y = custom.twice (h) }
<domain: "custom", opset_import: ["" : 21]>
twice (a) => (c) { b = Constant <value = float[2] {2, 2}> ()  c = Mul (a, b) }"""


def test_functions_are_inlined_with_their_constants_when_called_twice() -> None:
    model = ir.from_onnx_text(FUNCTIONS)
    assert InlineFunctionsPass()(model).modified
    assert sorted(node.op_type for node in model.graph) == ["Constant", "Constant", "Mul", "Mul"]
    assert not model.functions
    np.testing.assert_array_equal(run_model(model, FEEDS)["y"], [4, -8])
    check_idempotence(model, InlineFunctionsPass())


STAND_IN = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[2] x) => (float[2] y) { h = com.microsoft.Own (x)  y = com.microsoft.QuickGelu (h) }
<domain: "com.microsoft", opset_import: ["" : 21]> Own (a) => (c) { c = Neg (a) }
<domain: "com.microsoft", opset_import: ["" : 21]> QuickGelu (a) => (c) { c = Abs (a) }"""


def test_function_stays_with_its_calls_when_the_runtime_has_an_operator_of_its_name() -> None:
    model, pass_ = ir.from_onnx_text(STAND_IN), InlineFunctionsPass(("QuickGelu", "Gelu"))
    assert pass_(model).modified
    assert [node.op_type for node in model.graph] == ["Neg", "QuickGelu"]
    assert [name for _, name, _ in model.functions] == ["QuickGelu"]
    check_idempotence(model, pass_)


def test_functions_are_refused_when_one_calls_itself() -> None:
    model = ir.from_onnx_text(FUNCTIONS.replace("c = Mul (a, b)", "c = custom.twice (a)"))
    with pytest.raises(GraphPassError, match="twice"):
        InlineFunctionsPass()(model)


@pytest.mark.parametrize("depth", [18, 64])
def test_functions_are_refused_at_once_when_they_make_millions_of_nodes(depth: int) -> None:
    doubling = "".join(
        f"<domain: 'd', opset_import: ['' : 23, 'd' : 1]> f{i} (a) => (c) {{ b = d.f{i + 1} (a) c = d.f{i + 1} (b) }}\n"
        for i in range(depth)
    ).replace("'", '"')
    last = f'<domain: "d", opset_import: ["" : 23]> f{depth} (a) => (c) {{ c = Neg (a) }}'
    head = '<ir_version: 10, opset_import: ["" : 23, "d" : 1]>'
    model = ir.from_onnx_text(
        f"{head} g (float[2] x) => (float[2] y) {{ a = d.f0 (x) b = d.f0 (x) c = d.f0 (x) y = d.f0 (x) }}\n"
        f"{doubling}{last}"
    )
    with pytest.raises(GraphPassError, match=f"functions make {4 * 2**depth} nodes, expected at most 1000000"):
        InlineFunctionsPass()(model)


@pytest.mark.parametrize(
    "pass_", [InlineFunctionsPass(), LiftConstantsPass(), RemoveUnusedPass()], ids=lambda pass_: type(pass_).__name__
)
def test_graph_is_left_alone_when_there_is_nothing_to_prepare(pass_: ir.passes.PassBase) -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Neg (x) }}")
    text = as_text(model)
    assert not pass_(model).modified
    assert as_text(model) == text


@pytest.mark.parametrize("held", [np.zeros(1, np.float16), np.ones((), np.float32), np.zeros(1, np.float32)])
def test_shared_constant_takes_another_name_when_its_own_is_taken(held: np.ndarray) -> None:
    graph = ir.from_onnx_text(f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Neg (x) }}").graph
    graph.register_initializer(ir.val("zero", const_value=ir.tensor(held, name="zero")))
    value = shared_constant(graph, "zero", np.array(0, np.float32))
    assert value.name == "zero_1"
    assert shared_constant(graph, "zero", np.array(0, np.float32)) is value


LOGITS = f"""{HEADER}
g (int64[1,S] ids, float[1,P,2] "past_key_values.0.key")
  => (float[1,S,3] logits_Q4, float[1,S,2] hidden, float[1,T,2] "present.0.key")
<float[3,2] table = {{1, 2, -1, 0, 3, 1}}, float[2,3] head = {{1, 0, 2, -1, 1, 3}}> {{
  hidden = Gather (table, ids)
  logits = MatMul (hidden, head)
  logits_Q4 = Neg (logits)
  "present.0.key" = Concat <axis = 1> ("past_key_values.0.key", hidden)
}}"""
TOKENS = {"ids": np.array([[1, 2]]), "past_key_values.0.key": np.ones((1, 1, 2), np.float32)}


def test_logits_get_their_name_when_an_output_as_wide_as_the_vocabulary_has_another() -> None:
    model = ir.from_onnx_text(LOGITS)
    wanted = run_model(model, TOKENS)["logits_Q4"]
    assert NameLogitsPass()(model).modified
    assert [value.name for value in model.graph.outputs] == ["logits", "hidden", "present.0.key"]
    np.testing.assert_array_equal(run_model(model, TOKENS)["logits"], wanted)
    check_idempotence(model, NameLogitsPass())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[1,S,3] logits_Q4", "float[1,S,W] logits_Q4"),
        ("logits_Q4, float[1,S,2] hidden", "logits_Q4, float[1,S,3] logits_Q8, float[1,S,2] hidden"),
    ],
    ids=["none is known to be", "two are"],
)
def test_outputs_keep_their_names_when_none_or_several_may_be_the_logits(old: str, new: str) -> None:
    model = ir.from_onnx_text(LOGITS.replace(old, new).replace('  "present', '  logits_Q8 = Abs (logits)\n  "present'))
    before = as_text(model)
    assert not NameLogitsPass()(model).modified
    assert as_text(model) == before
