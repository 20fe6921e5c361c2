"""The DLO authors' own checkpoints, of MLP and of layer routing: their logits and decisions, from our artefacts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.bare_session import BareSession, left_padded

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint, and what the authors' code computed with it for each sample alone, without a cache."""

    folder: Path
    routed: tuple[int, ...]
    states: tuple[str, ...] = ()

    def expected(self, name):
        values = np.load(self.folder / "expected.npz")
        return [values[f"{name}_{b}"] for b in range(3)]


REFERENCES = {
    "mlp": Reference(DATA / "reference_mlp_routed", (0, 1, 3)),
    "layer": Reference(DATA / "reference_layer_routed", (0, 2, 3), ("past_active", "present_active")),
}


@pytest.fixture(scope="module", params=["masked", "compact", "if"])
def lowering(request):
    return request.param


@pytest.fixture(scope="module", params=list(REFERENCES))
def reference(request):
    return REFERENCES[request.param]


@pytest.fixture(scope="module")
def artefact(reference, lowering, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / lowering
    export_model(ExportRequest(str(reference.folder), folder, lowering=lowering, parity=False), Reporter())
    return folder


@pytest.mark.parametrize("cached", [False, True], ids=["at-once", "token-by-token"])
def test_artefact_equals_the_authors_code_when_samples_run_alone(reference, artefact, cached):
    session = BareSession(artefact / "model.onnx")
    for ids, expected in zip(reference.expected("ids"), reference.expected("logits"), strict=True):
        length = ids.shape[1]
        cuts = [2, *range(3, length + 1)] if cached else [length]
        mask, positions = np.ones((1, length)), np.arange(length)[np.newaxis]
        np.testing.assert_allclose(session.logits_of(ids, mask, positions, cuts), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cached", [False, True], ids=["at-once", "with-cache"])
def test_artefact_equals_the_authors_code_when_samples_share_a_left_padded_batch(reference, artefact, cached):
    ids, mask, positions = left_padded(reference.expected("ids"))
    length = ids.shape[1]
    cuts = [length - 3, length - 2, length - 1, length] if cached else [length]
    logits = BareSession(artefact / "model.onnx").logits_of(ids, mask, positions, cuts)
    for row, expected in enumerate(reference.expected("logits")):
        np.testing.assert_allclose(logits[row, -expected.shape[1] :], expected[0], rtol=0, atol=TOLERANCE)


def test_routers_decide_as_the_authors_code_did(reference, artefact):
    with open_artefact(artefact) as runner:
        assert runner.routed_layers == reference.routed
        for ids, active in zip(reference.expected("ids"), reference.expected("active"), strict=True):
            runner.reset(1)
            result = runner.step(ids, np.ones_like(ids), np.arange(ids.shape[1])[np.newaxis])
            decided = np.stack([result.router_scores[layer] > 0.5 for layer in reference.routed])
            np.testing.assert_array_equal(decided, active)


def test_released_graph_shows_nothing_but_its_interface(reference, artefact):
    session = BareSession(artefact / "model.onnx").session
    names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    cache = [
        f"{kind}.{i}.{part}" for kind in ("past_key_values", "present") for i in range(4) for part in ("key", "value")
    ]
    states = [f"{kind}.{i}" for kind in reference.states for i in reference.routed]
    assert sorted(names) == sorted(["input_ids", "attention_mask", "position_ids", "logits", *cache, *states])


@pytest.mark.parametrize("reference", ["layer"], indirect=True)
def test_skipped_tokens_leave_zeros_in_the_cache_when_they_skip_whole_layers(reference, artefact):
    session = BareSession(artefact / "model.onnx")
    for ids, active in zip(reference.expected("ids"), reference.expected("active"), strict=True):
        length = ids.shape[1]
        session.logits_of(ids, np.ones((1, length)), np.arange(length)[np.newaxis], [length - 1, length])
        for layer, was_active in zip(reference.routed, active, strict=True):
            np.testing.assert_array_equal(session.state[f"past_active.{layer}"], was_active)
            for part in ("key", "value"):
                rows = session.state[f"past_key_values.{layer}.{part}"]
                np.testing.assert_array_equal(np.any(rows, axis=(1, 3)), was_active)
