from __future__ import annotations

import numpy as np

from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.trace import compare_streams, trace_case, trace_reference
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.authors_model import AUTHORS, ROUTED, config_of, tensors_of

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


def test_streams_are_compared_under_the_reference_s_decisions() -> None:
    tensors = tensors_of(AUTHORS)
    for layer in ROUTED:
        name = f"model.routers.{layer}.weight"
        tensors[name] = ArrayTensor(-tensors[name].numpy())
    case = CASES["nothing active"]  # scores scale what is active
    with (
        TorchRunner.from_folder(AUTHORS) as runner,
        TorchRunner(llama_dlo_from_tensors(config_of(AUTHORS), tensors)) as other,
    ):
        errors = compare_streams(runner, other, case, trace_reference(runner, case))
    assert sorted(errors) == [0, 1, 2, 3]
    assert max(errors.values()) == 0


def test_trace_says_which_logits_are_shown_when_these_are_each_step_s_last() -> None:
    case = CASES["chunk and decode with a cache"]
    with TorchRunner.from_folder(AUTHORS, masked=True) as runner:
        whole = trace_reference(runner, case)
        runner.last_logits_only = True
        last = trace_case(runner, case, whole.decisions)
        streams = compare_streams(runner, runner, case, whole)
    assert whole.shown.tolist() == list(range(32))
    assert last.shown.tolist() == [23, 27, 28, 29, 30, 31]
    np.testing.assert_allclose(last.logits, whole.logits[:, last.shown], rtol=0, atol=1e-5)
    assert set(streams.values()) == {0.0}


def test_streams_are_compared_where_nothing_is_routed() -> None:
    tensors = {name: tensor for name, tensor in tensors_of(AUTHORS).items() if "routers" not in name}
    case = CASES["chunk and decode with a cache"]
    with TorchRunner(llama_dlo_from_tensors(config_of(AUTHORS) | {"is_dlo": False}, tensors)) as runner:
        trace = trace_reference(runner, case)
        assert compare_streams(runner, runner, case, trace) == dict.fromkeys(range(4), 0.0)
