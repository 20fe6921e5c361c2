"""The batch's dimension gets the name clients look for, wherever a graph of whatever exporter has it."""

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.name_batch_dimension import NameBatchDimensionPass
from tests.graph_passes.harness import check_idempotence

TEXT = """
<ir_version: 11, opset_import: ["": 23]>
g (int64[{tokens}, sequence] input_ids, float[{cache}, 2, past, 4] "past_key_values.0.key", float[{tokens}, rows] other)
    => (float[{cache}, 2, past, 4] "present.0.key", float[{tokens}, rows] sum)
{{
    "present.0.key" = Identity("past_key_values.0.key")
    sum = Add(other, other)
}}
"""


def shapes(tokens, cache):
    model = ir.from_onnx_text(TEXT.format(tokens=tokens, cache=cache))
    result = NameBatchDimensionPass()(model)
    check_idempotence(model, NameBatchDimensionPass())
    first = {value.name: str(value.shape[0]) for value in (*model.graph.inputs, *model.graph.outputs)}
    rest = {str(dim) for value in (*model.graph.inputs, *model.graph.outputs) for dim in value.shape[1:]}
    assert rest == {"sequence", "2", "past", "4", "rows"}, "other dimensions keep their names"
    return result.modified, first


def test_batch_is_renamed_everywhere_when_tokens_and_cache_call_it_differently():
    modified, first = shapes("n", "batch")
    assert modified
    assert set(first.values()) == {"batch_size"}


def test_graph_is_left_alone_when_it_has_the_name():
    modified, first = shapes("batch_size", "batch_size")
    assert not modified
    assert set(first.values()) == {"batch_size"}


def test_graph_is_left_alone_when_its_batch_is_fixed():
    modified, first = shapes(1, 1)
    assert not modified
    assert set(first.values()) == {"1"}
