"""Parity of an artefact that lies there: with its source, with another one, and after it was changed."""

import json
import re

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.layer_parity import check_parity_by_layer
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from tests.tiny_models import save_tiny_llama

ROUTED = [True, False, True]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("checkpoint") / "model", routed=ROUTED)


def _exported(checkpoint, folder, lowering="compact"):
    request = ExportRequest(str(checkpoint), folder, lowering=lowering, parity=False)
    return export_model(request, Reporter())


def _candidates(report):
    return list(dict.fromkeys(case.candidate for case in report.cases))


@pytest.mark.parametrize(
    ("lowering", "rungs"), [("masked", ["masked"]), ("compact", ["masked", "compact"]), ("if", ["masked", "if"])]
)
def test_every_rung_is_compared_when_the_source_is_right(checkpoint, tmp_path, lowering, rungs):
    result = _exported(checkpoint, tmp_path / "out", lowering)
    source = open_source(checkpoint, None)
    report = check_parity(source, result.folder, result.description)
    assert report, report.summary()
    assert _candidates(report) == rungs
    assert [run.candidate for run in report.greedy] == rungs
    assert all(case.decisions for case in report.cases)


def test_masked_form_takes_the_weights_when_routers_lie_in_the_data_file(tmp_path):
    # Wider than what stays in the .onnx file; the masked form multiplies them as a column, the lowered one as a row.
    model = save_tiny_llama(tmp_path / "model", routed=ROUTED, hidden=96, head_dim=24)
    result = _exported(model, tmp_path / "out", "if")
    stored = ir.load(result.folder / "model.onnx").graph.initializers["model.routers.0.weight"].const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert stored.shape.numpy() == (1, 96)
    report = check_parity(open_source(model, None), result.folder, result.description)
    assert report, report.summary()
    assert _candidates(report) == ["masked", "if"]


@pytest.mark.parametrize("slots", [1, 2, 7, 40])
def test_cases_fit_when_a_tensorrt_graph_has_few_slots(checkpoint, tmp_path, slots):
    result = _exported(checkpoint, tmp_path / "out")
    graphs = [TensorRtOptions("if", max_sequence=slots, max_cache=slots)]
    report = check_parity(open_source(checkpoint, None), result.folder, result.description, graphs)
    assert report, report.summary()
    assert _candidates(report) == ["masked", "compact", "trt if"]
    assert [len(run.tokens[0]) for run in report.greedy] == [max(1, slots - max(1, slots * 24 // 56))] * 3


def test_twins_are_compared_when_there_are_tensorrt_graphs(checkpoint, tmp_path):
    result = _exported(checkpoint, tmp_path / "out")
    graphs = [TensorRtOptions("compact"), TensorRtOptions("if", cache="growing"), TensorRtOptions("plugin")]
    report = check_parity(open_source(checkpoint, None), result.folder, result.description, graphs)
    assert report, report.summary()
    assert _candidates(report) == ["masked", "compact", "trt compact", "trt if, growing", "trt plugin"]


def test_parity_fails_when_a_weight_was_changed(checkpoint, tmp_path):
    result = _exported(checkpoint, tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    place = ir.load(result.folder / "model.onnx").graph.initializers[name].const_value
    with (result.folder / "model.onnx.data").open("r+b") as file:
        file.seek(place.offset)
        file.write(np.zeros(place.nbytes // 4, np.float32).tobytes())
    report = check_parity(open_source(checkpoint, None), result.folder, result.description)
    assert report.verdict == "FAIL"
    assert {case.first_diverging_layer for case in report.cases} == {1}


def test_source_is_refused_when_its_weights_are_others(checkpoint, tmp_path):
    result = _exported(checkpoint, tmp_path / "out")
    other = save_tiny_llama(tmp_path / "other", routed=ROUTED, intermediate=64)
    with pytest.raises(
        InputError, match=r"are not those of an export of this source: model\.layers\.0[\s\S]*hint: give the model"
    ):
        check_parity(open_source(other, None), result.folder, result.description)


@pytest.mark.parametrize(
    ("different", "words"),
    [
        ({"layers": 4, "routed": [*ROUTED, True]}, "has 3 layers, its source 4"),
        ({"routed": [True, True, True]}, "routes layers [0, 2], its source [0, 1, 2]"),
        ({"routed": None}, "routes layers [0, 2], its source []"),
        ({"vocab": 90}, "knows 97 tokens, its source 90"),
        ({"hidden": 64, "head_dim": 8}, "has a hidden size of 32, its source 64"),
    ],
    ids=["layers", "routed layers", "no routers", "vocabulary", "hidden size"],
)
@pytest.mark.parametrize("check", [check_parity, check_parity_by_layer])
def test_source_is_refused_when_it_is_another_model(checkpoint, tmp_path, check, different, words):
    result = _exported(checkpoint, tmp_path / "out", lowering="masked")
    other = save_tiny_llama(tmp_path / "other", **{"routed": ROUTED, **different})
    with pytest.raises(InputError, match=re.escape(words)):
        check(open_source(other, None), result.folder, result.description)


def test_parity_fails_when_the_source_is_another_of_the_same_form(checkpoint, tmp_path):
    result = _exported(checkpoint, tmp_path / "out")
    other = save_tiny_llama(tmp_path / "other", routed=ROUTED, seed=1)
    report = check_parity(open_source(other, None), result.folder, result.description)
    assert report.verdict == "FAIL"
    json.dumps(report.to_json(), allow_nan=False)
