"""References that stand in for a model: one of fewer layers, and two builds of one graph."""

from __future__ import annotations

import numpy as np
import pytest

from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.parity.fewer_layers import FewerLayersRunner
from dlo_export.runtimes.parity.two_builds import TwoBuildsRunner
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.authors_model import AUTHORS, ROUTED, config_of, tensors_of
from tests.runtimes.feeding import feed, joined_logits

SAMPLES = [np.arange(1, 7)[np.newaxis], np.arange(20, 24)[np.newaxis]]


def _runner(thresholds: dict[str, float] | None = None, *, head: float = 1.0) -> TorchRunner:
    """The authors' model, routed in layers 0, 1 and 3 of four."""
    config, tensors = config_of(AUTHORS), tensors_of(AUTHORS)
    tensors["lm_head.weight"] = ArrayTensor(tensors["lm_head.weight"].numpy() * np.float32(head))
    if thresholds is not None:
        config |= {"model_type": "llama_dlo_exattn_thresholds", "router_thresholds": thresholds}
    return TorchRunner(llama_dlo_from_tensors(config, tensors), masked=True)


def test_layers_are_numbered_as_the_candidate_does_when_it_has_fewer() -> None:
    with (
        _runner({"0": 0.25, "3": 0.375}) as whole,
        FewerLayersRunner(_runner({"0": 0.25, "3": 0.375}), (1, 2, 3)) as fewer,
    ):
        assert (fewer.num_layers, fewer.routed_layers, fewer.thresholds) == (3, (0, 2), {2: 0.375})
        wanted, _ = feed(whole, SAMPLES, cached=2, hidden_states=True)
        found, _ = feed(fewer, SAMPLES, cached=2, hidden_states=True)
    for right, seen in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(seen.logits, right.logits)
        assert (list(seen.router_scores), list(seen.hidden_states)) == ([0, 2], [0, 1, 2])
        for new, old in enumerate((1, 2, 3)):
            np.testing.assert_array_equal(seen.hidden_states[new], right.hidden_states[old])
        for new, old in ((0, 1), (2, 3)):
            np.testing.assert_array_equal(seen.router_scores[new], right.router_scores[old])


def test_decisions_go_to_the_layers_they_are_for_when_the_candidate_has_fewer() -> None:
    rng = np.random.default_rng(0)
    first, last = (rng.random((2, 6)) < 0.5 for _ in range(2))
    with _runner() as whole, FewerLayersRunner(_runner(), (0, 2, 3)) as fewer:
        found, _ = feed(fewer, SAMPLES, cached=2, force={0: first, 2: last})
        # Whatever layer 1, which the candidate lacks, is told: it is there to change nothing.
        wanted, _ = feed(whole, SAMPLES, cached=2, force={0: first, 1: first, 3: last})
        np.testing.assert_array_equal(joined_logits(found), joined_logits(wanted))
        feed(whole, SAMPLES)
    with pytest.raises(RuntimeInputError, match="closed"):
        fewer.reset(1)


@pytest.mark.parametrize("force", [None, dict.fromkeys(ROUTED, np.ones((2, 6), bool))], ids=["free", "forced"])
def test_case_runs_on_the_build_that_it_is_for(force: dict[int, np.ndarray] | None) -> None:
    with _runner() as whole:
        wanted = joined_logits(feed(whole, SAMPLES, cached=2, force=force)[0])
    both = TwoBuildsRunner(_runner(head=2.0), _runner(head=4.0), name="both", thresholds={1: 0.25})
    with both:
        assert (both.num_layers, both.routed_layers, both.thresholds) == (4, ROUTED, {1: 0.25})
        feed(both, SAMPLES, force=dict.fromkeys(ROUTED, np.zeros((2, 6), bool)))  # a case before it
        found = joined_logits(feed(both, SAMPLES, cached=2, force=force)[0])
    np.testing.assert_array_equal(found, wanted * (2 if force is None else 4))
