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


def test_cases_are_made_of_a_text_when_its_tokens_are_given() -> None:
    cases = parity_cases(VOCAB, routed=False, token_ids=range(100))
    np.testing.assert_array_equal(cases[0].feeds[0].input_ids, [range(32)])
    with pytest.raises(RuntimeInputError, match="at least 58"):
        parity_cases(VOCAB, routed=False, token_ids=range(20))
