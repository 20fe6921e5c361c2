"""Graphs whose cache has a fixed size compute what those compute whose cache grows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph_passes.golden_graphs import GOLDENS, golden_graph, source_text
from tests.graph_passes.harness import make_session, run_model

SEQUENCES = ([1, 2, 4, 0, 3, 1, 2], [3, 3, 1, 4, 0])
# By sequence, how many tokens a step feeds of it: slots that it leaves are written by the next one.
STEPS = ((4, 1), (1, 2), (2, 2))


def _growing(golden: str | None) -> list[np.ndarray]:
    """Logits of each sequence, alone and fed at once."""
    model = ir.from_onnx_text(source_text()) if golden is None else golden_graph(golden)
    logits = []
    for tokens in SEQUENCES:
        ids = np.array([tokens])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[np.newaxis]}
        for value in model.graph.inputs:
            if (value.name or "").startswith("past_active"):
                feeds[value.name] = np.zeros((1, 0), bool)
            elif (value.name or "").startswith("past_"):
                feeds[value.name] = np.zeros((1, 1, 0, 2), np.float32)
        logits.append(run_model(model, feeds)["logits"][0])
    return logits


def _static(golden: str) -> list[np.ndarray]:
    """Logits of each sequence, both in one batch, fed in steps whose shorter row ends in padding."""
    session = make_session(golden_graph(golden))
    state = {
        value.name: np.zeros([size if isinstance(size, int) else 2 for size in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    written, logits = np.zeros(2, np.int64), [[], []]
    for counts in STEPS:
        width = max(counts)
        ids, positions = np.full((2, width), 4), np.zeros((2, width), np.int64)
        for row, count in enumerate(counts):
            span = np.arange(written[row], written[row] + count)
            ids[row, :count], positions[row, :count] = np.array(SEQUENCES[row])[span], span
        feeds = {"input_ids": ids, "position_ids": positions, "write_indices": written, "kv_lengths": written + counts}
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {**feeds, **state}), strict=True))
        state = {
            name: outputs[name.replace("past_key_values", "present").replace("past_active", "present_active")]
            for name in state
        }
        for row, count in enumerate(counts):
            logits[row].append(outputs["logits"][row, :count])
        written = written + counts
    return [np.concatenate(rows) for rows in logits]


@pytest.mark.parametrize(
    ("static", "growing"),
    [
        ("use_static_cache", None),
        ("use_static_cache_with_activity", "route_whole_layers"),
        ("lower_static_cache_to_if", "route_whole_layers"),
        ("lower_static_cache_to_topk", "route_whole_layers"),
    ],
)
def test_logits_are_those_of_a_growing_cache(static: str, growing: str | None) -> None:
    assert static in GOLDENS
    for found, wanted in zip(_static(static), _growing(growing), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
