from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cache.attention_cache import attend, cached_attentions, heads_first
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.spec.provenance import PASS_KEY, TaggedNodes
from tests.graph_passes.harness import run_model

# Two layers, numbered 3 and 7: two query heads of two on one key and value head.
PAST = 'float[B,1,P,2] "past_key_values.{0}.key", float[B,1,P,2] "past_key_values.{0}.value"'
PRESENT = 'float[B,1,T,2] "present.{0}.key", float[B,1,T,2] "present.{0}.value"'
NODE = """{y}, "present.{i}.key", "present.{i}.value" = Attention <q_num_heads = 2, kv_num_heads = 1{attributes}>
     (q, k, v, {mask}, "past_key_values.{i}.key", "past_key_values.{i}.value")"""
TEXT = f"""<ir_version: 11, opset_import: ["" : 23]>
tiny (int64[B,S] input_ids, float[B,S,4] q, float[B,S,2] k, float[B,S,2] v, float[B,1,S,T] mask,
      {PAST.format(3)}, {PAST.format(7)})
  => (float[B,S,4] y, float[B,S,4] z, {PRESENT.format(3)}, {PRESENT.format(7)})
{{ {NODE.format(y="y", i=3, attributes=", scale = 0.25", mask="mask")}
   {NODE.format(y="z", i=7, attributes="", mask="mask")} }}"""


def _feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    past = {f"past_key_values.{i}.{part}": (2, 1, 4, 2) for i in (3, 7) for part in ("key", "value")}
    shapes = {"q": (2, 3, 4), "k": (2, 3, 2), "v": (2, 3, 2), "mask": (2, 1, 3, 7), **past}
    numbers = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {"input_ids": np.zeros((2, 3), np.int64), **numbers}


def test_attentions_are_described_by_their_cache_when_layers_have_numbers_of_their_own() -> None:
    first, second = cached_attentions(ir.from_onnx_text(TEXT).graph, "Asking")
    assert (first.layer, second.layer) == (3, 7)
    assert (first.query_heads, first.kv_heads, first.head_dim, first.dtype) == (2, 1, 2, ir.DataType.FLOAT)
    assert second.name == "model.layers.7.self_attn"
    assert [first.operand(index).name for index in range(4)] == ["q", "k", "v", "mask"]
    assert [value.name for value in second.node.outputs[1:]] == ["present.7.key", "present.7.value"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("scale = 0.25", "is_causal = 1", "sets one of is_causal, "),
        ("scale = 0.25", "softcap = 2.0", "sets one of is_causal, "),
        ("(q, k, v, mask", "(q, k, v, ", "has no mask"),
        ("q_num_heads = 2, ", "", "takes heads apart already"),
        ("past_key_values.3.key", "cache.3.key", "does not read a graph input 'past_key_values.{i}.key'"),
        ("float[B,1,P,2]", "float[B,H,P,2]", "does not read a graph input 'past_key_values.{i}.key'"),
        ("input_ids", "ids", "the graph has no input 'input_ids'"),
        ("= Attention", "= Attention2", "the graph has no Attention node"),
    ],
)
def test_attention_is_refused_with_the_reason_and_a_hint_when(old: str, new: str, reason: str) -> None:
    with pytest.raises(GraphPassError, match=r"^Asking: ") as caught:
        cached_attentions(ir.from_onnx_text(TEXT.replace(old, new)).graph, "Asking")
    assert reason in str(caught.value)
    assert "hint: export the checkpoint itself" in str(caught.value)


def test_all_problems_are_told_at_once_when_several_attentions_have_one() -> None:
    text = TEXT.replace("kv_num_heads = 1>", "kv_num_heads = 1, softcap = 1.0>").replace(
        "scale = 0.25", "is_causal = 1"
    )
    with pytest.raises(GraphPassError) as caught:
        cached_attentions(ir.from_onnx_text(text.replace("input_ids", "ids")).graph, "Asking")
    assert str(caught.value).count("sets one of") == 2
    assert "no input 'input_ids'" in str(caught.value)


def test_attribute_is_let_through_when_it_has_its_neutral_value() -> None:
    text = TEXT.replace("scale = 0.25", "is_causal = 0, softcap = 0.0")
    assert len(cached_attentions(ir.from_onnx_text(text).graph, "Asking")) == 2


def test_outputs_stay_the_same_when_the_cache_grows_outside_attention() -> None:
    model = ir.from_onnx_text(TEXT)
    expected = run_model(model, _feeds())
    for attention in cached_attentions(model.graph, "Asking"):
        nodes = TaggedNodes("Asking", attention.layer)
        key, value = (
            nodes.add(
                "Concat",
                attention.operand(index + 3),
                heads_first(model.graph, nodes, attention, index, part),
                name=f"{attention.name}.present_{part}",
                dtype=attention.dtype,
                shape=("B", 1, "T", 2),
                axis=2,
            )
            for index, part in ((1, "key"), (2, "value"))
        )
        attend(model.graph, nodes, attention, (key, value), attention.operand(3))
    found = run_model(model, _feeds())
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, err_msg=name)
    assert all(node.metadata_props[PASS_KEY] == "Asking" for node in model.graph)
