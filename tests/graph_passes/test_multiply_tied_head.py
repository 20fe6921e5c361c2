"""A tied head becomes one product where its logits would be copied, and is left alone where they are not."""

import numpy as np
import onnxruntime as ort
import pytest

from dlo_export.graph_passes.cleanup.multiply_tied_head import MultiplyTiedHeadPass
from tests.graph_passes.harness import check_pass, run_model

HEAD = """
<ir_version: 11, opset_import: ["" : 23]>
head (int64[batch, sequence] input_ids) => (float[batch, sequence, 5] logits)
<float[5, 2] embeddings = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, int64[2] to_rows = {-1, 2}, int64[1] vocab = {5}>
{
  normed = Gather (embeddings, input_ids)
  rows = Reshape (normed, to_rows)
  scores = Gemm <transB: int = 1> (rows, embeddings)
  places = Shape <start: int = 0, end: int = 2> (normed)
  shape = Concat <axis: int = 0> (places, vocab)
  logits = Reshape (scores, shape)
}
"""
BEFORE = {"Gemm": 1, "Reshape": 2, "Concat": 1, "Shape": 1, "MatMul": 0, "Transpose": 0}
AFTER = {"Gemm": 0, "Reshape": 0, "Concat": 0, "Shape": 0, "MatMul": 1, "Transpose": 1}
FEEDS = {"input_ids": np.array([[0, 3, 1], [4, 4, 2]])}


def test_head_is_one_product_when_it_is_tied():
    model = check_pass(HEAD, MultiplyTiedHeadPass(), BEFORE, AFTER, FEEDS)
    (logits,) = run_model(model, FEEDS, ort.GraphOptimizationLevel.ORT_ENABLE_ALL).values()
    assert logits.shape == (2, 3, 5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<transB: int = 1> (rows, embeddings)", "(rows, columns)"),
        ("<transB: int = 1>", "<transB: int = 1, alpha: float = 0.5>"),
        ("(rows, embeddings)", "(rows, embeddings, vocab_bias)"),
        ("to_rows = {-1, 2}", "to_rows = {6, 2}"),
        ("places = Shape <start: int = 0, end: int = 2> (normed)", "places = Identity (two_and_three)"),
        ("logits = Reshape (scores, shape)", "whole = Reshape (scores, shape)\n  logits = Div (whole, half)"),
    ],
    ids=["not transposed", "scaled", "with a bias", "so many rows", "known places", "divided behind it"],
)
def test_head_is_left_alone_when_it_is_another(old, new):
    more = {
        "columns": "float[2, 5] columns = {1, 3, 5, 7, 9, 2, 4, 6, 8, 10}",
        "vocab_bias": "float[5] vocab_bias = {1, 2, 3, 4, 5}",
        "two_and_three": "int64[2] two_and_three = {2, 3}",
        "half": "float half = {0.5}",
    }
    declared = "".join(f", {text}" for name, text in more.items() if name in new)
    assert old in HEAD
    text = HEAD.replace(old, new).replace("vocab = {5}>", f"vocab = {{5}}{declared}>")
    check_pass(text, MultiplyTiedHeadPass(), {"Gemm": 1}, {"Gemm": 1, "MatMul": 0}, FEEDS)
