"""Changed graphs are refused by name, or what is made of them computes what they compute.

DLO_TEST_FUZZ_GRAPHS is how many are tried, DLO_TEST_FUZZ_SEED where they begin.
"""

import collections
import os

from tests.fuzz.edited_graphs import run_case, save_sources

CASES = int(os.environ.get("DLO_TEST_FUZZ_GRAPHS", "20"))
FIRST_SEED = int(os.environ.get("DLO_TEST_FUZZ_SEED", "0"))


def test_edited_graph_is_refused_or_right_when_the_graph_was_changed(tmp_path):
    save_sources(tmp_path / "sources")
    outcomes = [run_case(seed, tmp_path / "sources", tmp_path / str(seed)) for seed in _seeds()]
    counted = collections.Counter(outcome.kind for outcome in outcomes)
    print(dict(counted))
    assert not counted["wrong"], "\n".join(outcome.said for outcome in outcomes if outcome.kind == "wrong")
    # Changes that all graphs are refused for, or that harm nothing, would show nothing.
    assert counted["refused"] >= CASES // 10
    assert counted["right"] >= CASES // 10


def _seeds():
    return range(FIRST_SEED, FIRST_SEED + CASES)
