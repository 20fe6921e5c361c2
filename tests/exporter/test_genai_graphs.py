"""Graphs of onnxruntime-genai's builder: packed, fused, quantised; deepened and routed in their own form."""

import collections
import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from tests.foreign_graphs import save_routed_adapter
from tests.genai_graphs import FORMS, save_genai_graph

# How far a weight may be from the checkpoint's, as a share of the largest of its tensor.
ROUNDING = {"fp32": 0, "fp16": 1e-3, "int4": 1 / 8, "int8": 1 / 128}
SEQUENCE = 7


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The graph of a form, made once."""
    return functools.cache(lambda form: save_genai_graph(tmp_path_factory.mktemp("genai"), form))


def logits(path, steps=(SEQUENCE,)):
    """Of a graph that counts positions itself, step by step behind its cache, float32 [1, tokens, vocab]."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options)
    past = {value.name: value for value in session.get_inputs() if value.name.startswith("past")}
    outputs = [value.name for value in session.get_outputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {name: np.zeros((1, 2, 0, 16), types[value.type]) for name, value in past.items()}
    ids = np.random.default_rng(0).integers(0, 200, (1, sum(steps)))
    found, done = [], 0
    for step in steps:
        mask = np.ones((1, done + step), np.int64)
        feeds = {"input_ids": ids[:, done : done + step], "attention_mask": mask, **cache}
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        cache = {name: results[name.replace("past_key_values", "present")] for name in past}
        found.append(results["logits"].astype(np.float32))
        done += step
    return np.concatenate(found, 1)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_checkpoint(graph, form):
    path = graph(form)
    wanted = load_file(path.parents[1] / "checkpoint" / "model.safetensors")
    opened = open_foreign_graph(path)
    assert opened.num_layers == 3
    assert opened.tensors.keys() == wanted.keys()
    for name, tensor in opened.tensors.items():
        assert tensor.shape == wanted[name].shape
        allowed = ROUNDING[form.split(",")[0]] * np.abs(wanted[name]).max()
        assert np.abs(tensor.numpy().astype(np.float32) - wanted[name]).max() <= allowed, name


@pytest.mark.parametrize("form", FORMS)
def test_logits_stay_when_layers_that_add_nothing_are_injected(graph, form, tmp_path):
    path = graph(form)
    opened = open_foreign_graph(path)
    save_adapter(expansion_adapter(opened.tensors, placements("tli", 3, every=1)), tmp_path / "adapter")
    export_model(ExportRequest(str(path), tmp_path / "out", adapter=tmp_path / "adapter"), Reporter())
    steps = (4, 1, 2)
    before, after = logits(path, steps), logits(tmp_path / "out" / "model.onnx", steps)
    # In float16 the fused norm reads a sum that is not rounded yet; what adds nothing to it rounds it.
    assert np.abs(after - before).max() <= (1e-3 * np.abs(before).max() if form == "fp16" else 0)
    # What stood in the graph stands there, byte for byte; what is new has the form of what stood there.
    old, new = ir.load(path).graph, ir.load(tmp_path / "out" / "model.onnx").graph
    contents = {value.const_value.tobytes() for value in new.initializers.values()}
    assert all(value.const_value.tobytes() in contents for value in old.initializers.values())
    forms = [{(value.dtype, tuple(value.shape)) for value in each.initializers.values()} for each in (old, new)]
    assert forms[0] == forms[1]
    # Twice as many layers, and the first one's norm is the only one without an addition, as before.
    counts = [collections.Counter((node.domain, node.op_type) for node in each) for each in (old, new)]
    outside = {op: count % 3 for op, count in counts[0].items()}
    assert counts[1] == {op: 2 * (count - outside[op]) + outside[op] for op, count in counts[0].items()}


@pytest.mark.parametrize("form", ["fp32", "fp32, apart", "int4", "int4, gate and up packed", "int4, zero points"])
def test_lowerings_equal_the_masked_graph_when_routed(graph, form, tmp_path):
    adapter = save_routed_adapter(graph(form), tmp_path / "adapter")
    found = {}
    for lowering in ("masked", "compact", "if"):
        request = ExportRequest(str(graph(form)), tmp_path / lowering, adapter=adapter, lowering=lowering)
        export_model(request, Reporter())
        found[lowering] = logits(tmp_path / lowering / "model.onnx", (4, 1, 1))
    assert np.abs(found["masked"] - logits(graph(form), (4, 1, 1))).max() > 0.1
    for lowering in ("compact", "if"):
        assert np.abs(found[lowering] - found["masked"]).max() <= 1e-5
