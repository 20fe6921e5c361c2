"""The table of tolerances: each dtype passes in its own, shows in a finer one, and hides no mistake in either."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.compare import Candidate, compare
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.tolerances import TOLERANCES, OwnError, Tolerance
from dlo_export.runtimes.runner import Runner, StepRequest, StepResult
from dlo_export.runtimes.torch.reference import open_reference
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.authors_model import AUTHORS, config_of, tensors_of

VOCAB = 131
CASES = parity_cases(VOCAB, routed=True)


@pytest.fixture(scope="module")
def reference() -> Iterator[Runner]:
    with open_reference(config_of(AUTHORS), tensors_of(AUTHORS)) as runner:
        yield runner


def _judge(reference: Runner, runner: Runner, dtype: str) -> ParityReport:
    candidate = Candidate("candidate", lambda: runner, lambda: runner)
    runner.close = lambda: None  # type: ignore[method-assign]  # opened twice, by turns
    return compare(reference, [candidate], CASES, dtype=dtype)


def test_table_has_every_dtype_of_an_export_and_grows_with_its_rounding() -> None:
    assert TOLERANCES.keys() == BY_OPTION.keys()
    for finer, coarser in (("fp32", "fp16"), ("fp16", "bf16")):
        fine, coarse = TOLERANCES[finer], TOLERANCES[coarser]
        assert fine.mean < coarse.mean
        assert fine.largest < coarse.largest
        assert fine.margin < coarse.margin
        assert fine.score_layer < coarse.score_layer
        assert fine.score < coarse.score


@pytest.mark.parametrize(
    ("own", "limit", "times"),
    [
        ((0.5, 0.75, 2.0), 10, (1.0, 1.5, 4.0)),  # what the table allows already stays
        ((4.0, 5.0, 6.0), 10, (8.0, 10.0, 10.0)),
        ((4.0, 5.0, 6.0), math.inf, (8.0, 10.0, 12.0)),
        ((math.nan, math.inf, 2.0), 10, (1.0, 1.0, 4.0)),
    ],
)
def test_tolerance_is_widened_number_by_number_where_the_reference_is_off_itself(
    own: tuple[float, float, float], limit: float, times: tuple[float, float, float]
) -> None:
    mean, largest, score = own
    table = Tolerance(mean=1.0, largest=1.0, score_layer=1.0, score=1.0, margin=1.0, own_errors=2, why="")
    wide = table.widened(OwnError(mean, largest, score, score_layer=mean), limit=limit)
    assert (wide.mean, wide.largest, wide.margin) == times
    assert (wide.score_layer, wide.score) == (times[0], times[2])


@pytest.mark.parametrize(("dtype", "finer"), [("fp16", "fp32"), ("bf16", "fp32")])
def test_16_bits_pass_in_their_own_tolerance_and_fail_in_a_finer_one(reference: Runner, dtype: str, finer: str) -> None:
    runner = TorchRunner.from_folder(AUTHORS, dtype=dtype)
    own = _judge(reference, runner, dtype)
    assert own.verdict in ("PASS", "AMBIGUOUS"), own.summary()  # near-ties may turn
    assert own.tolerance == TOLERANCES[dtype]
    assert _judge(reference, runner, finer).verdict == "FAIL"
    # Not by a hair: rounding uses less than half of what is allowed, on average.
    assert max(case.logits.mean for case in own.cases) < TOLERANCES[dtype].mean / 2


class _PaddingBlind(TorchRunner):
    """Attends to padding."""

    def _compute(self, request: StepRequest) -> StepResult:
        mask = np.ones_like(request.attention_mask)
        return super()._compute(
            StepRequest(request.input_ids, mask, request.position_ids, request.force_active, request.last_logits)
        )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("mistake", ["mask", "o_proj", "router", "position"])
def test_mistakes_fail_when_16_bits_are_allowed(reference: Runner, dtype: str, mistake: str) -> None:
    tensors, config = tensors_of(AUTHORS), config_of(AUTHORS)
    if mistake == "o_proj":
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = ArrayTensor(np.ascontiguousarray(tensors[name].numpy().T))
    if mistake == "router":
        tensors["model.routers.1.weight"] = ArrayTensor(-tensors["model.routers.1.weight"].numpy())
    if mistake == "position":
        config["rope_theta"] = 100.0
    model = llama_dlo_from_tensors(config, tensors).to(getattr(torch, BY_OPTION[dtype].name))
    model.model.routers.to(torch.float32)
    runner = (_PaddingBlind if mistake == "mask" else TorchRunner)(model)
    assert _judge(reference, runner, dtype).verdict == "FAIL"
