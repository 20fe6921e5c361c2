"""What skip efficiency says of times that are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.measure import Samples
from benchmarks.skip_efficiency import efficiency


def test_efficiency_is_of_each_launch_when_blocks_differ() -> None:
    # Two launches of three blocks, in each of which one block was slow on one side.
    dense = Samples(np.array([4.0, 4.0, 9.0, 8.0, 8.0, 8.0]))
    ideal = Samples(np.array([2.0, 2.0, 2.0, 4.0, 4.0, 4.0]))
    routed = Samples(np.array([2.0, 2.0, 2.0, 5.0, 5.0, 40.0]))
    found = efficiency(dense, routed, ideal, blocks=3)
    assert found is not None
    assert found.values == pytest.approx([1.0, (8 / 5 - 1) / (8 / 4 - 1)])


def test_efficiency_is_not_known_when_the_ideal_took_as_long_as_the_dense_step() -> None:
    dense = Samples(np.array([4.0, 4.0]))
    assert efficiency(dense, dense, Samples(np.array([2.0, 4.0])), blocks=1) is None
