from __future__ import annotations

import numpy as np
import pytest

from dlo_export.runtimes.bench import Subject, Workload, compare_speed, ratio, spread
from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.runtimes.graphs import Builds

TOKENS = list(range(100))
WORKLOAD = Workload(batch=2, prompt_tokens=8, decode_tokens=3, rounds=4, warm_up=1)


def test_every_subject_is_timed_in_every_round_when_several_are_compared(builds: Builds) -> None:
    with (
        OnnxRuntimeRunner(builds.released, threads=1, allow_spinning=False) as released,
        OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1, allow_spinning=False) as scored,
    ):
        timings = compare_speed([Subject(released, TOKENS), Subject(scored, TOKENS)], WORKLOAD)
        scored.reset(2)
        ids = np.array(TOKENS[:22]).reshape(2, 11)
        scores = scored.step(ids, np.ones_like(ids), np.tile(np.arange(11), (2, 1))).router_scores
    for timing in timings:
        assert timing.prefill.shape == timing.decode.shape == (4,)
        assert (timing.prefill > 0).all()
        assert (timing.decode > 0).all()
    assert timings[0].active_rate == {}
    assert timings[1].active_rate == pytest.approx({layer: (s > 0.5).mean() for layer, s in scores.items()})
    assert set(timings[0].summary()) == {"prefill_seconds", "decode_seconds", "active_rate"}


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_active_rate_is_exact_when_decisions_are_forced(builds: Builds, rate: float) -> None:
    with OnnxRuntimeRunner(builds.forced, weights_folder=builds.folder, threads=1) as runner:
        (timing,) = compare_speed([Subject(runner, TOKENS, active_rate=rate)], WORKLOAD)
    assert sorted(timing.active_rate) == [0, 1, 3]
    assert np.mean([*timing.active_rate.values()]) == pytest.approx(rate)


def test_ratio_is_taken_block_by_block() -> None:
    assert ratio(np.array([2.0, 40.0, 6.0]), np.array([1.0, 20.0, 3.0])) == {"median": 2, "p10": 2, "p90": 2}
    assert spread(np.arange(11.0)) == {"median": 5, "p10": 1, "p90": 9}


def test_bench_raises_when_the_workload_or_the_text_is_too_small(builds: Builds) -> None:
    with pytest.raises(RuntimeInputError, match=r"batch is 0.*rounds is 0"):
        Workload(batch=0, rounds=0)
    with (
        OnnxRuntimeRunner(builds.released, threads=1) as runner,
        pytest.raises(RuntimeInputError, match=r"has 21 tokens, expected at least 22"),
    ):
        compare_speed([Subject(runner, TOKENS[:21])], WORKLOAD)
