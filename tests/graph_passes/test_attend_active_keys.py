"""In long steps attention is given active tokens' keys alone: logits and cache of any batch are as without the pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.cleanup.attend_active_queries import AttendActiveQueriesPass
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.golden_graphs import ROUTERS, source_text
from tests.graph_passes.harness import make_session

LONG = 8
BATCH = 3
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Step:
    """Of a batch: who was and is active, bool [batch, past] and [batch, sequence], and how long its padding is."""

    past: np.ndarray
    active: np.ndarray
    padding: tuple[int, ...] = (0,) * BATCH

    def feeds(self, seed: int) -> Arrays:
        rng, (batch, past), sequence = np.random.default_rng(seed), self.past.shape, self.active.shape[1]
        mask = (np.arange(past + sequence) >= np.array(self.padding)[:, np.newaxis]).astype(np.int64)
        caches = rng.standard_normal((2, batch, 1, past, 2)).astype(np.float32)
        caches[:, ~self.past[:, np.newaxis]] = 0  # skipped tokens leave zeros
        return {
            "input_ids": rng.integers(0, 5, (batch, sequence)),
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
            "past_active.0": self.past,
            "force_active.0": self.active,
            "past_key_values.0.key": caches[0],
            "past_key_values.0.value": caches[1],
        }


def _rows(*rows: str) -> np.ndarray:
    """Of "1" and "0"."""
    return np.array([[digit == "1" for digit in row] for row in rows])


STEPS = {
    "ragged": Step(_rows("1010", "0000", "1111"), _rows("11110000", "00000001", "10101010")),
    "one_sequence_skips": Step(_rows("1100", "0110", "0011"), _rows("11001100", "00000000", "10000001")),
    "one_sequence_skips_behind_others": Step(_rows("0000", "1111", "0000"), _rows("11001100", "00000000", "10000001")),
    "nobody_active": Step(_rows("1100", "0110", "0011"), np.zeros((BATCH, 8), bool)),
    "nobody_skips": Step(_rows("1100", "0110", "0011"), np.ones((BATCH, 8), bool)),
    "nobody_skips_in_one": Step(_rows("1100", "0000", "0011"), _rows("11111111", "01010101", "00000000")),
    "one_active_token": Step(_rows("1100", "0110", "0011"), _rows("00000000", "00001000", "00000000")),
    "one_active_token_alone": Step(np.zeros((BATCH, 4), bool), _rows("00000000", "10000000", "00000000")),
    "nothing_before": Step(np.zeros((BATCH, 0), bool), _rows("11110000", "00000001", "10101010")),
    "all_before_skipped": Step(np.zeros((BATCH, 200), bool), _rows("11110000", "00000001", "10101010")),
    "all_before_active": Step(np.ones((BATCH, 200), bool), _rows("11110000", "00000001", "10101010")),
    "padded_before": Step(_rows("1010", "0011", "1111"), _rows("11110000", "01000001", "10101010"), (0, 3, 1)),
    "padded_within": Step(_rows("1010", "1111", "1111"), _rows("11110000", "11010101", "10101010"), (0, 8, 5)),
    "one_row_is_all_padding": Step(
        _rows("1010", "1111", "0000"), _rows("11110000", "11010101", "10101010"), (0, 12, 0)
    ),
    "short": Step(_rows("1010", "0000", "1111"), _rows("1111000", "0000001", "1010101")),
}


def _random_step(seed: int) -> Step:
    rng = np.random.default_rng(seed)
    past, sequence = int(rng.integers(0, 30)), int(rng.integers(LONG, 20))
    rates = rng.choice([0.0, 0.1, 0.5, 0.9], (2, BATCH, 1))
    padding = tuple(int(number) for number in rng.integers(0, past + sequence, BATCH) * rng.integers(0, 2, BATCH))
    return Step(rng.random((BATCH, past)) < rates[0], rng.random((BATCH, sequence)) < rates[1], padding)


@pytest.fixture(scope="module", params=["layer", "attention-active"])
def sessions(request: pytest.FixtureRequest) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """The graph without the pass, and with it."""
    kind: RoutingKind = request.param
    found = []
    for passes in ((), (AttendActiveQueriesPass(least=LONG),)):
        model = ir.from_onnx_text(source_text())
        for pass_ in (RouteLayersPass(ROUTERS, kind=kind), LowerSkipToCompactionPass(), *passes):
            assert pass_(model).modified
        ExposeRoutingPass(force=True)(model)
        found.append(make_session(model))
    return found[0], found[1]


def _outputs(session: ort.InferenceSession, feeds: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _check(sessions: tuple[ort.InferenceSession, ort.InferenceSession], step: Step, seed: int = 0) -> None:
    feeds, past = step.feeds(seed), step.past.shape[1]
    expected, found = (_outputs(session, feeds) for session in sessions)
    real = feeds["attention_mask"][:, past:].astype(bool)
    np.testing.assert_allclose(found["logits"][real], expected["logits"][real], rtol=0, atol=5e-6)
    assert np.isfinite(found["logits"]).all()
    np.testing.assert_array_equal(found["present_active.0"], np.concatenate([step.past, step.active], 1))
    for part in ("key", "value"):
        name = f"present.0.{part}"
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert not found[name][:, 0][~found["present_active.0"]].any(), name


@pytest.mark.parametrize("name", STEPS)
def test_step_computes_the_same(sessions: tuple[ort.InferenceSession, ort.InferenceSession], name: str) -> None:
    _check(sessions, STEPS[name])


@pytest.mark.parametrize("seed", range(40))
def test_random_step_computes_the_same(sessions: tuple[ort.InferenceSession, ort.InferenceSession], seed: int) -> None:
    _check(sessions, _random_step(seed), seed)
