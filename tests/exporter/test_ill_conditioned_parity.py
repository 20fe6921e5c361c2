"""Parity of models that amplify rounding: what is as exact as PyTorch passes, what is wrong fails all the same."""

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.trace import trace_case, trace_reference
from dlo_export.runtimes.torch.reference import open_reference
from tests.tiny_models import save_tiny_llama

STANDARD_DEVIATION = 0.4  # of weights; at this width a trained model's are about 0.09
SHAPE = {"hidden": 128, "intermediate": 160, "layers": 16, "routed": [True, False] * 8, "seed": 1}


def _ill_conditioned(folder):
    model = save_tiny_llama(folder, **SHAPE)
    tensors = load_file(model / "model.safetensors")
    rng = np.random.default_rng(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "router" not in name:
            tensors[name] = STANDARD_DEVIATION * rng.standard_normal(tensor.shape, np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def model_and_artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ill")
    model = _ill_conditioned(folder / "model")
    return model, export_model(ExportRequest(str(model), folder / "out", lowering="masked", parity=False), Reporter())


def _parity(model, result):
    return check_parity(open_source(model, None), result.folder, result.description)


def test_parity_passes_and_says_why_when_the_reference_itself_is_inexact(model_and_artefact):
    report = _parity(*model_and_artefact)
    assert report.verdict == "PASS", report.summary()
    judged_by_own_error = [case for case in report.cases if case.own_error is not None]
    assert judged_by_own_error, "no case exceeds the table: the model is not ill-conditioned enough for this test"
    assert "as exact as the reference: its own fp32 is off float64 by mean" in report.summary()
    assert report.to_json()["cases"][report.cases.index(judged_by_own_error[0])]["own_error"]["mean"] > 0


@pytest.mark.parametrize("name", ["model.layers.9.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"])
def test_parity_fails_when_a_weight_of_an_ill_conditioned_model_is_off_by_a_hundredth(model_and_artefact, name):
    model, result = model_and_artefact
    place = ir.load(result.folder / "model.onnx").graph.initializers[name].const_value
    right = place.numpy().tobytes()
    scaled = (np.frombuffer(right, np.float32) * np.float32(1.01)).tobytes()
    with (result.folder / "model.onnx.data").open("r+b") as file:
        file.seek(place.offset)
        file.write(scaled)
    try:
        report = _parity(model, result)
    finally:
        with (result.folder / "model.onnx.data").open("r+b") as file:
            file.seek(place.offset)
            file.write(right)
    assert report.verdict == "FAIL"


def test_reference_is_not_asked_for_its_own_error_when_the_table_suffices(tmp_path):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    report = _parity(model, export_model(ExportRequest(str(model), tmp_path / "out", parity=False), Reporter()))
    assert report.verdict == "PASS"
    assert all(case.own_error is None for case in report.cases)


def test_float64_reference_is_the_same_to_the_bit_when_it_runs_layer_by_layer(tmp_path):
    source = open_source(_ill_conditioned(tmp_path / "model"), None)
    case = parity_cases(97, routed=True)[0]
    traces = {}
    for stream in (False, True):
        with open_reference(source.config_json(), source.tensors(), dtype="float64", stream=stream) as runner:
            traces[stream] = trace_reference(runner, case)
    np.testing.assert_array_equal(traces[False].logits, traces[True].logits)
    with open_reference(source.config_json(), source.tensors()) as runner:
        single = trace_case(runner, case, traces[False].decisions)
    assert 1e-6 < np.abs(single.logits - traces[False].logits).max() < 1e-1


def test_16_bit_case_is_judged_by_pytorchs_own_16_bits_when_the_table_fails_it(tmp_path):
    model = _ill_conditioned(tmp_path / "model")
    request = ExportRequest(str(model), tmp_path / "out", lowering="masked", dtype="fp16", parity=False)
    report = _parity(model, export_model(request, Reporter()))
    judged_by_own_error = [case for case in report.cases if case.own_error is not None]
    assert judged_by_own_error, "no case exceeds the table: the model is not ill-conditioned enough for this test"
    for case in judged_by_own_error:
        # Two fp16 implementations of this model are about as far from float32 as one another.
        assert 0.3 < case.logits.mean / case.own_error.mean < 3
    assert "PyTorch's own fp16 is off its fp32 by mean" in report.summary()
