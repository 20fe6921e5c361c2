"""`inspect`'s figures, against what follows from a model's sizes."""

import json

import onnx_ir as ir
import pytest

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.inspection import inspect_model
from dlo_export.exporter.progress import Reporter
from tests.foreign_graphs import save_foreign_graph
from tests.tiny_models import save_tiny_llama

HIDDEN, INTERMEDIATE, VOCAB, KV = 32, 56, 97, 16
ATTENTION = HIDDEN * (HIDDEN + KV + KV + HIDDEN) + HIDDEN  # its norm counts too
MLP = 3 * HIDDEN * INTERMEDIATE + HIDDEN
BYTES = {"fp32": 4, "fp16": 2}
# Shapes, axes and such, which are no weights.
CONSTANTS = 200


def _export(folder, **options):
    export_model(ExportRequest(options.pop("model"), folder / "out", parity=False, **options), Reporter())
    return inspect_model(folder / "out")


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("lowering", "skips"), [("masked", "nothing"), ("compact", "tokens"), ("if", "steps")])
def test_bytes_follow_from_the_sizes_when_a_routed_model_is_inspected(tmp_path, dtype, lowering, skips):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    inspection = _export(tmp_path, model=str(model), dtype=dtype, lowering=lowering)
    assert inspection.skips == skips
    size = BYTES[dtype]
    wanted = {
        "attention": 3 * ATTENTION * size,
        "mlp": 3 * MLP * size,
        "routers": 2 * HIDDEN * 4,  # float32, whatever the dtype
        "embedding and head": 2 * VOCAB * HIDDEN * size,
        "other": HIDDEN * size,
    }
    assert inspection.bytes.keys() == wanted.keys()
    for part, count in wanted.items():
        assert count <= inspection.bytes[part] <= count + CONSTANTS, part
    initializers = ir.load(tmp_path / "out" / "model.onnx").graph.initializers.values()
    assert sum(inspection.bytes.values()) == sum(value.const_value.nbytes for value in initializers)
    assert [(row["index"], row["routed"]) for row in inspection.layers] == [(0, True), (1, False), (2, True)]
    for row in inspection.layers:
        assert (ATTENTION + MLP) * size <= row["bytes"] <= (ATTENTION + MLP) * size + CONSTANTS


@pytest.mark.parametrize("lowering", ["masked", "compact", "if"])
@pytest.mark.parametrize("model_type", ["llama_dlo", "llama_dlo_attn"])
def test_layers_have_no_problem_when_an_artefact_routes_their_attention(tmp_path, model_type, lowering):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True], model_type=model_type)
    inspection = _export(tmp_path, model=str(model), lowering=lowering)
    assert [row["problem"] for row in inspection.layers] == [None] * 3
    assert all(row["attention"].startswith("Attention") for row in inspection.layers)


def test_layers_are_marked_when_some_were_injected(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    with open_checkpoint(model) as checkpoint:
        plan = placements("tli", 3, every=1, init="zero_out")
        save_adapter(expansion_adapter(checkpoint.tensors, plan), tmp_path / "adapter")
    inspection = _export(tmp_path, model=str(model), adapter=tmp_path / "adapter")
    assert [row["injected"] for row in inspection.layers] == [False, True] * 3
    assert [row["identity"] for row in inspection.layers] == [False, True] * 3
    assert not any(row["routed"] for row in inspection.layers)
    assert inspection.skips is None
    document = json.loads(json.dumps(inspection.to_json()))
    assert document["description"]["lowering"] == "none"
    assert document["engine_problems"] is None


def test_operators_are_counted_when_subgraphs_hold_them(tmp_path):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    ops = _export(tmp_path, model=str(model), lowering="if").ops
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert ops["If"] == 2
    assert ops["Attention"] == 3
    outside = sum(node.op_type == "MatMul" for node in graph)
    assert ops["MatMul"] > outside  # the routed MLPs stand in branches
    assert list(ops.values()) == sorted(ops.values(), reverse=True)


def test_foreign_graph_is_inspected_when_nothing_describes_it(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "fp16")
    inspection = inspect_model(graph)
    assert inspection.description is None
    for row in inspection.layers:
        assert not any(row[mark] for mark in ("injected", "routed", "identity"))
    assert inspection.bytes["attention"] == pytest.approx(3 * ATTENTION * 2, abs=CONSTANTS)
    assert inspection.bytes["routers"] == 0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dlo.closes", "x", "'dlo.closes' is 'x', expected the number of one of its 3 inputs"),
        ("dlo.closes", "3", "'dlo.closes' is '3', expected the number of one of its 3 inputs"),
        ("dlo.closes", "-1", "'dlo.closes' is '-1', expected the number of one of its 3 inputs"),
        ("dlo.layer", "x", "'dlo.layer' is 'x', expected the number of a decoder layer"),
        ("dlo.layer", "9" * 5000, "expected the number of a decoder layer"),
        ("dlo.layer", None, "'dlo.layer' is None, expected the number of a decoder layer"),
    ],
)
def test_graph_of_ours_is_refused_by_node_when_what_passes_said_of_it_is_damaged(tmp_path, key, value, expected):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    _export(tmp_path, model=str(model), lowering="compact")
    graph = ir.load(tmp_path / "out" / "model.onnx")
    for node in graph.graph:
        if key in node.metadata_props and (key == "dlo.closes" or "dlo.role" in node.metadata_props):
            node.metadata_props.pop(key)
            node.metadata_props.update({} if value is None else {key: value})
    ir.save(graph, tmp_path / "alone.onnx")
    with pytest.raises(InputError, match=rf"alone\.onnx: \w+ node 'model\.[\w.]+': metadata .*{expected}"):
        inspect_model(tmp_path / "alone.onnx")


def test_layers_problem_says_why_when_a_graph_is_no_decoder(tmp_path):
    text = '<ir_version: 11, opset_import: ["" : 23]> one (float[2] x) => (float[2] y) { y = Neg (x) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "neg.onnx")
    inspection = inspect_model(tmp_path / "neg.onnx")
    assert (inspection.ops, inspection.layers) == ({"Neg": 1}, [])
    assert inspection.layers_problem


def test_inspection_is_refused_when_there_is_nothing_to_inspect(tmp_path):
    with pytest.raises(InputError, match=r"no model\.onnx in it\s+hint:"):
        inspect_model(tmp_path)
    with pytest.raises(InputError, match=r"no such file\s+hint:"):
        inspect_model(tmp_path / "model.onnx")
