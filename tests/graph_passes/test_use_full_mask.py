"""What `is_causal` and masks of bool say, as one additive mask: attention computes what it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cache.use_full_mask import UseFullMaskPass
from tests.graph_passes.harness import as_text, check_idempotence, check_pass

BATCH, SEQUENCE, PAST = 2, 3, 2
TOTAL = PAST + SEQUENCE
# Heads of keys and values are shared by two heads of queries; h is two layers' stream, which both attend with one mask.
TEXT = """<ir_version: 11, opset_import: ["" : 23]>
g (int64[B,S] input_ids, float[B,S,8] h, {mask}
   float[B,1,P,4] "past_key_values.0.key", float[B,1,P,4] "past_key_values.0.value")
  => (float[B,S,8] y, float[B,1,T,4] "present.0.key", float[B,1,T,4] "present.0.value")
<int64[1] last = {{-1}}, int64[2] split = {{4, 4}}> {{
  ids = Cast <to = 1> (input_ids)
  column = Unsqueeze (ids, last)
  x = Add (h, column)
  k, v = Split <axis = -1> (x, split)
  a, "present.0.key", "present.0.value" = Attention <q_num_heads = 2, kv_num_heads = 1{causal}>
    (x, k, v, {read}, "past_key_values.0.key", "past_key_values.0.value")
  b, pk, pv = Attention <q_num_heads = 2, kv_num_heads = 1{causal}>
    (a, k, v, {read}, "past_key_values.0.key", "past_key_values.0.value")
  y = Add (a, b)
}}"""
PADDING = np.ones((BATCH, 1, SEQUENCE, TOTAL), bool)
PADDING[1, :, :, 0] = False
MASKS = {
    "bool": PADDING,
    "additive": np.where(PADDING, np.float32(0.5), np.float32(-1e30)),
    "none": None,
}


def _text(mask: np.ndarray | None, *, causal: bool) -> str:
    kind = "" if mask is None else f"{'bool' if mask.dtype == bool else 'float'}[B,1,S,T] mask, "
    return TEXT.format(mask=kind, causal=", is_causal = 1" if causal else "", read="mask" if kind else "")


def _feeds(mask: np.ndarray | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, BATCH, 1, PAST, 4)).astype(np.float32)
    return {
        "input_ids": rng.integers(0, 4, (BATCH, SEQUENCE)),
        "h": rng.standard_normal((BATCH, SEQUENCE, 8)).astype(np.float32),
        "past_key_values.0.key": cache[0],
        "past_key_values.0.value": cache[1],
        **({} if mask is None else {"mask": mask}),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_computes_what_it_did_when_its_mask_says_everything(mask: np.ndarray | None, causal: bool) -> None:
    text = _text(mask, causal=causal)
    if not causal and (mask is None or mask.dtype != bool):
        model = ir.from_onnx_text(text)
        before = as_text(model)
        assert not UseFullMaskPass()(model).modified, "there is nothing to be said"
        assert as_text(model) == before
        return
    before = {"Attention": 2, "Where": 0, "LessOrEqual": 0}
    after = {"Attention": 2, "Where": 1, "LessOrEqual": int(causal)}
    model = check_pass(text, UseFullMaskPass(), before, after, _feeds(mask))
    check_idempotence(model, UseFullMaskPass())
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert all("is_causal" not in node.attributes for node in attentions)
    assert len({node.inputs[3] for node in attentions}) == 1, "the layers share it"


@pytest.mark.parametrize("old", ["q_num_heads = 2, kv_num_heads = 1", "input_ids"])
def test_attention_is_left_alone_when_it_is_of_another_form(old: str) -> None:
    new = "scale = 0.5" if "heads" in old else "ids_of_another_name"
    text = _text(PADDING, causal=True).replace(old, new)
    model = ir.from_onnx_text(text)
    before = as_text(model)
    assert not UseFullMaskPass()(model).modified
    assert as_text(model) == before
