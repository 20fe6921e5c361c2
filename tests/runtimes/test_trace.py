from __future__ import annotations

import numpy as np

from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.trace import compare_streams, trace_case, trace_reference
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.authors_model import AUTHORS, ROUTED

CASES = {case.name: case for case in parity_cases(131, routed=True)}


def test_reference_decisions_are_its_own_scores_when_nothing_is_forced() -> None:
    case = CASES["chunk and decode with a cache"]
    with TorchRunner.from_folder(AUTHORS, masked=True) as runner:
        trace = trace_reference(runner, case)
        again = trace_case(runner, case, trace.decisions)
    assert trace.logits.shape == (1, 32, 131)
    assert trace.decisions is not None
    assert [step[0].shape[1] for step in trace.decisions] == [24, 4, 1, 1, 1, 1]
    for layer in ROUTED:
        joined = np.concatenate([step[layer] for step in trace.decisions], 1)
        np.testing.assert_array_equal(joined, trace.scores[layer] > 0.5)
    np.testing.assert_array_equal(again.logits, trace.logits)


def test_reference_obeys_the_case_when_it_forces_decisions() -> None:
    case = CASES["nothing active"]
    with TorchRunner.from_folder(AUTHORS, masked=True) as runner:
        trace = trace_reference(runner, case)
    assert trace.decisions is not None
    assert not any(active.any() for step in trace.decisions for active in step.values())


def test_streams_are_alike_when_the_candidate_gathers_what_the_reference_masks() -> None:
    case = CASES["left-padded batch with a cache"]
    with TorchRunner.from_folder(AUTHORS, masked=True) as masked, TorchRunner.from_folder(AUTHORS) as gathered:
        errors = compare_streams(masked, gathered, case, trace_reference(masked, case))
    assert sorted(errors) == [0, 1, 2, 3]
    assert max(errors.values()) < 1e-5
