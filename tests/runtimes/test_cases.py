from __future__ import annotations

import numpy as np
import pytest

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.parity.cases import parity_cases

VOCAB = 131
CASES = parity_cases(VOCAB, routed=True)


def test_cases_are_deterministic_and_reach_padding_cache_and_decisions() -> None:
    again = parity_cases(VOCAB, routed=True)
    for one, two in zip(CASES, again, strict=True):
        for feed, same in zip(one.feeds, two.feeds, strict=True):
            np.testing.assert_array_equal(feed.input_ids, same.input_ids)
    by_name = {case.name: case for case in CASES}
    assert [feed.input_ids.shape[1] for feed in by_name["chunk and decode with a cache"].feeds] == [24, 4, 1, 1, 1, 1]
    padded = by_name["left-padded batch with a cache"]
    assert padded.real.sum(1).tolist() == [32, 16, 10]
    assert padded.feeds[0].position_ids[1, -1] == 11
    mixed = by_name["mixed decisions"].forced([0, 3])
    assert mixed is not None
    assert 0.3 < np.mean([decision.mean() for step in mixed for decision in step.values()]) < 0.7
    assert by_name["prefill"].forced([0, 3]) is None


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 8, 9, 31])
def test_cases_keep_their_steps_as_far_as_they_fit_when_the_cache_is_small(longest: int) -> None:
    cases = parity_cases(VOCAB, routed=True, longest=longest)
    assert [case.name for case in cases] == [case.name for case in CASES]
    for case in cases:
        lengths = [feed.input_ids.shape[1] for feed in case.feeds]
        assert min(lengths) >= 1
        assert sum(lengths) == longest == case.feeds[-1].attention_mask.shape[1]
        assert case.real.any(1).all(), "every sequence has a token"
    steps = {case.name: len(case.feeds) for case in cases}
    assert (steps["chunk and decode with a cache"] > 1) == (longest > 1)
    assert (steps["left-padded batch with a cache"] > 1) == (longest > 2)


def test_batches_are_of_equal_length_when_there_may_be_no_padding() -> None:
    cases = {case.name: case for case in parity_cases(VOCAB, routed=True, padded=False)}
    assert {"batch", "batch with a cache"} <= cases.keys()
    assert all(case.real.all() and case.real.shape[1] == 32 for case in cases.values())
    assert cases["batch"].batch == 3


def test_cases_are_made_of_a_text_when_its_tokens_are_given() -> None:
    cases = parity_cases(VOCAB, routed=False, token_ids=range(100))
    np.testing.assert_array_equal(cases[0].feeds[0].input_ids, [range(32)])
    assert parity_cases(VOCAB, routed=False, token_ids=range(58))[2].real.sum() == 58
    with pytest.raises(RuntimeInputError, match="at least 58"):
        parity_cases(VOCAB, routed=False, token_ids=range(57))
