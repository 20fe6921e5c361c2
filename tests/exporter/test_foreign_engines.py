"""TensorRT engines of someone else's graph: its decoder built anew on the weights that were found in it."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.finite_weights import NonFiniteWeightError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from tests.genai_graphs import save_genai_graph

OPTIMUM = Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx"
# Largest difference of a logit between a graph and the twin of its engine, both in fp32.
BAR = 5e-4


@pytest.fixture(autouse=True)
def engine_cache(monkeypatch):
    monkeypatch.setenv("DLO_EXPORT_CACHE", "")


def save_routers(folder, layers, hidden):
    rng = np.random.default_rng(0)
    routers = {
        f"model.routers.{layer}.weight": ArrayTensor(rng.standard_normal((1, hidden), np.float32))
        for layer in range(layers)
    }
    save_adapter(DloAdapter("mlp", (True,) * layers, tensors=routers), folder)
    return folder


def test_engine_is_built_and_its_twin_equals_pytorch_when_optimum_wrote_the_graph(tmp_path):
    adapter = save_routers(tmp_path / "routers", 3, 32)
    request = ExportRequest(
        str(OPTIMUM), tmp_path / "out", adapter=adapter, trt=TensorRtRequest(max_cache=64, max_sequence=32)
    )
    description = export_model(request, Reporter()).description
    assert description.parity.verdict == "PASS"
    assert (description.dtype, description.source.kind) == ("fp32", "onnx")
    (engine,) = description.engines
    assert engine.file.stat().st_size == engine.build.bytes
    assert engine.lowering == "compact"
    assert all(engine.build.census.skipping.values())
    assert [spec.name for spec in engine.interface.inputs][:2] == ["input_ids", "position_ids"]
    assert "write_indices" in {spec.name for spec in engine.interface.inputs}
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    twin = [case for case in report["cases"] if case["candidate"].startswith("trt")]
    assert len(twin) >= 5
    assert max(case["logits"]["largest_absolute"] for case in twin) <= BAR
    # Nothing is left of what the twin's own weights took.
    assert open_description(tmp_path / "out").parity == description.parity


def exported_genai(tmp_path, form, **config):
    """A routed artefact of the builder's graph, the checkpoint's config.json beside it, some of its values changed."""
    graph = save_genai_graph(tmp_path / "model", form)
    values = json.loads((graph.parents[1] / "checkpoint" / "config.json").read_text())
    (graph.parent / "config.json").write_text(json.dumps(values | config))
    adapter = save_routers(tmp_path / "routers", 3, 64)
    export_model(ExportRequest(str(graph), tmp_path / "out", adapter=adapter, parity=False), Reporter())
    with contextlib.closing(open_source(graph, adapter)) as source:
        options = TensorRtOptions("if", max_cache=64, max_sequence=32)
        return check_parity(source, tmp_path / "out", open_description(tmp_path / "out"), [options])


@pytest.mark.parametrize("form", ["int4", "int4, DequantizeLinear", "int8", "int4, tied"])
def test_twin_equals_the_graph_when_its_weights_are_quantised(tmp_path, form):
    report = exported_genai(tmp_path, form)
    assert report.verdict == "PASS", report.summary()
    # Where kernels sum other numbers of rows otherwise, the masked form is held against without rounding to 8 bits.
    assert report.reference.startswith("its own masked form")
    assert report.reference.endswith(" and its weights dequantised")
    twin = [case for case in report.cases if case.candidate == "trt if"]
    assert max(case.logits.largest_absolute for case in twin) <= BAR


def test_parity_fails_at_the_twin_when_config_json_is_of_another_rope(tmp_path):
    report = exported_genai(tmp_path, "int4", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    failed = {case.candidate for case in report.cases if case.judge(report.tolerance).verdict == "FAIL"}
    assert (report.verdict, failed) == ("FAIL", {"trt if"})


def _without_config(folder):
    (folder / "config.json").unlink()


def _without_head(folder):
    """Whatever the head multiplies by comes out of a node, not out of a file."""
    model = ir.load(folder / "model.onnx")
    (logits,) = [value for value in model.graph.outputs if value.name == "logits"]
    head = next(node for node in reversed(model.graph) if node.op_type == "MatMul")
    inner = ir.node("Abs", [head.inputs[1]])
    model.graph.insert_before(head, inner)
    head.replace_input_with(1, inner.outputs[0])
    assert logits.producer() is not None
    ir.save(model, folder / "model.onnx")


def _with_other_weights(folder):
    """A factor in front of an MLP that no Llama has."""
    model = ir.load(folder / "model.onnx")
    gate = next(node for node in model.graph if node.op_type == "Sigmoid").inputs[0].producer()
    factor = ir.Value(name="factor", const_value=ir.tensor(np.full(32, 2, np.float32), name="factor"))
    model.graph.register_initializer(factor)
    scaled = ir.node("Mul", [gate.inputs[0], factor])
    model.graph.insert_before(gate, scaled)
    gate.replace_input_with(0, scaled.outputs[0])
    ir.save(model, folder / "model.onnx")


REFUSED = {
    "no_config": (_without_config, "no config.json lies beside the graph"),
    "no_head": (_without_head, "holds no lm_head.weight where a llama has it"),
    "other_weights": (_with_other_weights, "layer 0"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_engines_are_refused_with_the_reason_when_the_decoder_cannot_be_built_anew(tmp_path, change, reason):
    shutil.copytree(OPTIMUM.parent, tmp_path / "graph")
    change(tmp_path / "graph")
    with pytest.raises(InputError, match=reason) as refusal:
        export_model(
            ExportRequest(str(tmp_path / "graph" / "model.onnx"), tmp_path / "out", trt=TensorRtRequest()), Reporter()
        )
    assert refusal.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_engine_holds_what_is_no_number_only_when_that_was_asked_for(tmp_path, allowed):
    shutil.copytree(OPTIMUM.parent, tmp_path / "graph")
    model = ir.load(OPTIMUM)
    (norm,) = [value for value in model.graph.initializers.values() if value.name == "model.norm.weight"]
    norm.const_value = ir.tensor(np.full(32, np.nan, np.float32), name=norm.name)
    ir.save(model, tmp_path / "graph" / "model.onnx")
    graph = open_foreign_graph(tmp_path / "graph" / "model.onnx", allow_nonfinite=allowed)
    weight = graph.engine_model(ir.DataType.BFLOAT16).graph.initializers["model.norm.weight"].const_value
    with contextlib.nullcontext() if allowed else pytest.raises(NonFiniteWeightError, match=r"model\.norm\.weight"):
        assert np.isnan(weight.numpy().astype(np.float32)).all()
