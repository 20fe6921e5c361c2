"""Thresholds that a benchmark gives reach every form of router."""

from __future__ import annotations

import numpy as np

from benchmarks.common.threshold_inputs import ACTIVE, SKIPPED, thresholds_as_inputs
from dlo_export.graph_passes.routing.fuse_router_gather import FuseRouterGatherPass
from tests.graph_passes.graphs import tiny_feeds
from tests.graph_passes.harness import run_model
from tests.graph_passes.test_fuse_router_gather import compacted, run


def test_operator_gathers_the_tokens_that_a_benchmark_says() -> None:
    models = [compacted(), compacted()]
    FuseRouterGatherPass()(models[1])
    for model in models:
        thresholds_as_inputs(model)
    limits = np.where([[True, False, True], [False, False, True]], ACTIVE, SKIPPED).astype(np.float32)
    expected = run_model(models[0], {**tiny_feeds(), "threshold.0": limits})
    np.testing.assert_array_equal(
        run(models[1], **{"threshold.0": limits[..., np.newaxis]})["logits"], expected["logits"]
    )
