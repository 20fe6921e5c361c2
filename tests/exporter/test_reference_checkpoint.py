"""The DLO authors' own mlp-routing checkpoint: their logits and decisions, from our artefact."""

from pathlib import Path

import numpy as np
import pytest

from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.bare_session import BareSession, left_padded

REFERENCE = Path(__file__).parents[1] / "data" / "reference_mlp_routed"
EXPECTED = np.load(REFERENCE / "expected.npz")
SAMPLES = [EXPECTED[f"ids_{b}"] for b in range(3)]
LOGITS = [EXPECTED[f"logits_{b}"] for b in range(3)]
ROUTED_LAYERS = (0, 1, 3)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["masked", "compact", "if"])
def artefact(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / request.param
    export_model(ExportRequest(str(REFERENCE), folder, lowering=request.param, parity=False), Reporter())
    return folder


@pytest.mark.parametrize("cached", [False, True], ids=["at-once", "token-by-token"])
def test_artefact_equals_the_authors_code_when_samples_run_alone(artefact, cached):
    session = BareSession(artefact / "model.onnx")
    for ids, expected in zip(SAMPLES, LOGITS, strict=True):
        length = ids.shape[1]
        cuts = [2, *range(3, length + 1)] if cached else [length]
        mask, positions = np.ones((1, length)), np.arange(length)[np.newaxis]
        np.testing.assert_allclose(session.logits_of(ids, mask, positions, cuts), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cached", [False, True], ids=["at-once", "with-cache"])
def test_artefact_equals_the_authors_code_when_samples_share_a_left_padded_batch(artefact, cached):
    ids, mask, positions = left_padded(SAMPLES)
    length = ids.shape[1]
    cuts = [length - 3, length - 2, length - 1, length] if cached else [length]
    logits = BareSession(artefact / "model.onnx").logits_of(ids, mask, positions, cuts)
    for row, expected in enumerate(LOGITS):
        np.testing.assert_allclose(logits[row, -expected.shape[1] :], expected[0], rtol=0, atol=TOLERANCE)


def test_routers_decide_as_the_authors_code_did(artefact):
    with open_artefact(artefact) as runner:
        assert runner.routed_layers == ROUTED_LAYERS
        for b, ids in enumerate(SAMPLES):
            runner.reset(1)
            result = runner.step(ids, np.ones_like(ids), np.arange(ids.shape[1])[np.newaxis])
            decided = np.stack([result.router_scores[layer] > 0.5 for layer in ROUTED_LAYERS])
            np.testing.assert_array_equal(decided, EXPECTED[f"active_{b}"])


def test_released_graph_shows_nothing_but_its_interface(artefact):
    session = BareSession(artefact / "model.onnx").session
    names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    cache = [
        f"{kind}.{i}.{part}" for kind in ("past_key_values", "present") for i in range(4) for part in ("key", "value")
    ]
    assert sorted(names) == sorted(["input_ids", "attention_mask", "position_ids", "logits", *cache])
