"""Artefacts as runners: as released, and with what is inside exposed in memory."""

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_runner import exposed_model, open_artefact, open_engines
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.errors import BackendUnavailableError, RuntimeInputError
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.runtimes.feeding import feed
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact")
    checkpoint = save_tiny_llama(folder / "model", routed=[True, False, True])
    return export_model(ExportRequest(str(checkpoint), folder / "out", parity=False), Reporter()).folder


def test_artefact_shows_its_routers_when_scores_are_asked_for(artefact):
    ids = [np.arange(3, 11)[np.newaxis]]
    with open_artefact(artefact, threads=1) as shown, open_artefact(artefact, scores=False) as hidden:
        assert (shown.name, shown.routed_layers) == ("out", (0, 2))
        assert (hidden.name, hidden.routed_layers) == ("out", ())
        (scored,), _ = feed(shown, ids)
        (released,), _ = feed(hidden, ids)
    assert sorted(scored.router_scores) == [0, 2]
    assert released.router_scores == {}
    np.testing.assert_allclose(scored.logits, released.logits, atol=1e-5)


def test_dense_artefact_is_opened_as_released_when_scores_are_asked_for(tmp_path):
    checkpoint = save_tiny_llama(tmp_path / "model")
    folder = export_model(ExportRequest(str(checkpoint), tmp_path / "out", parity=False), Reporter()).folder
    with open_artefact(folder) as runner:
        assert (runner.num_layers, runner.routed_layers) == (3, ())


def test_released_graph_stays_as_it_is_when_it_is_exposed(artefact):
    released = ir.load(artefact / "model.onnx")
    before = ir.to_proto(released).SerializeToString()
    model = exposed_model(released, force=True, streams=True)
    assert ir.to_proto(released).SerializeToString() == before
    with OnnxRuntimeRunner(model, weights_folder=artefact, threads=1) as runner:
        force = {layer: np.ones((1, 4), bool) for layer in (0, 2)}
        (result,), _ = feed(runner, [np.arange(4)[np.newaxis]], force=force, hidden_states=True)
    assert sorted(result.hidden_states) == [0, 1, 2]
    assert result.hidden_states[1].shape == (1, 4, 32)


def test_folder_is_refused_when_it_is_no_artefact_or_has_no_engines(artefact, tmp_path):
    for scores in (True, False):
        with pytest.raises(InputError, match=r"has no dlo_artifact\.json\s+hint: "):
            open_artefact(tmp_path, scores=scores)
    with pytest.raises(RuntimeInputError, match=r"engines[\s\S]*hint: .*--trt"):
        open_engines(artefact)


@pytest.mark.parametrize("routed", [None, (True, True)])
def test_what_the_provider_lacks_is_said_when_it_cannot_run_the_type(tmp_path, routed):
    save_tiny_llama(tmp_path / "model", layers=2, routed=routed)
    export_model(ExportRequest(str(tmp_path / "model"), tmp_path / "out", parity=False, dtype="bf16"), Reporter())
    with pytest.raises(BackendUnavailableError, match="CPU provider does not implement bfloat16") as refused:
        open_artefact(tmp_path / "out")
    assert "--dtype fp32" in (refused.value.hint or "")
