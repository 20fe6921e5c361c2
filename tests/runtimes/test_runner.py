"""What every runner refuses, shown on one that computes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.runner import Forcing, Runner, StepRequest, StepResult


class CountingRunner(Runner):
    """Counts what it is asked for; takes batches of at most two, refuses token 9, and breaks on token 8."""

    def __init__(self, forcing: Forcing = "possible") -> None:
        super().__init__("counting", num_layers=3, routed_layers=(0, 2), forcing=forcing)
        self.steps = self.frees = 0

    def _empty_cache(self, batch: int) -> None:
        if batch > 2:
            raise StepError("counting: too many", hint="fewer")

    def _compute(self, request: StepRequest) -> StepResult:
        if (request.input_ids == 9).any():
            raise StepError("counting: failed", hint="none")
        if (request.input_ids == 8).any():
            raise RuntimeError("broken in the middle")
        self.steps += 1
        return StepResult(np.zeros((*request.input_ids.shape, 1), np.float32), {}, {})

    def _free(self) -> None:
        self.frees += 1


def _step(runner: Runner, ids: list[list[int]], total: int, **force: np.ndarray) -> StepResult:
    array = np.array(ids)
    decisions = {int(name.removeprefix("layer")): values for name, values in force.items()} or None
    return runner.step(array, np.ones((len(ids), total), np.int64), np.zeros_like(array), force_active=decisions)


def test_steps_follow_each_other_when_the_mask_grows_with_them() -> None:
    with CountingRunner() as runner:
        assert (runner.name, runner.num_layers, runner.routed_layers) == ("counting", 3, (0, 2))
        runner.reset(1)
        _step(runner, [[1, 2]], 2)
        _step(runner, [[3]], 3)
        with pytest.raises(StepError, match=r"attention_mask has shape \[1, 3\], expected \[1, 4\]"):
            _step(runner, [[3]], 3)
        runner.reset(2)
        _step(runner, [[1], [2]], 1)
    assert runner.steps == 3


def test_cache_stays_as_it_was_when_a_step_or_a_reset_fails() -> None:
    with CountingRunner() as runner:
        runner.reset(1)
        _step(runner, [[1, 2]], 2)
        with pytest.raises(StepError, match="failed"):
            _step(runner, [[9]], 3)
        with pytest.raises(StepError, match="too many"):
            runner.reset(3)
        _step(runner, [[3]], 3)


def test_fork_is_refused_when_there_is_no_token_to_repeat() -> None:
    with CountingRunner() as runner:
        runner.reset(1)
        with pytest.raises(StepError, match=r"fork 1 sequences of 0 tokens, expected one with tokens"):
            runner.fork(2)


def test_runner_asks_for_a_reset_when_a_step_broke_in_the_middle() -> None:
    with CountingRunner() as runner:
        runner.reset(1)
        with pytest.raises(RuntimeError, match="in the middle"):
            _step(runner, [[8]], 1)
        with pytest.raises(StepError, match="step before reset"):
            _step(runner, [[1]], 1)
        runner.reset(1)
        _step(runner, [[1]], 1)


def test_step_is_refused_when_the_runner_was_not_reset_or_was_closed() -> None:
    with CountingRunner() as runner:
        with pytest.raises(StepError, match="step before reset"):
            _step(runner, [[1]], 1)
        runner.close()
    assert runner.frees == 1
    for call in (lambda: _step(runner, [[1]], 1), lambda: runner.reset(1)):
        with pytest.raises(StepError, match="after the runner was closed"):
            call()


def test_step_names_all_problems_when_shapes_and_layers_are_wrong() -> None:
    with CountingRunner() as runner:
        runner.reset(2)
        with pytest.raises(StepError) as info:
            _step(runner, [[1, 2], [3, 4]], 3, layer0=np.ones((2, 1), bool), layer1=np.ones((2, 2), bool))
    for part in (
        "attention_mask has shape [2, 3], expected [2, 2]",
        "force_active[0] has shape [2, 1], expected [2, 2]",
        "force_active is for layers [0, 1], expected [0, 2]",
        "hint:",
    ):
        assert part in str(info.value)


@pytest.mark.parametrize(
    ("forcing", "given", "message"),
    [("required", False, "got none"), ("impossible", True, "cannot be given to it")],
)
def test_decisions_are_refused_when_the_model_takes_them_otherwise(forcing: Forcing, given: bool, message: str) -> None:
    force = {"layer0": np.ones((1, 1), bool), "layer2": np.ones((1, 1), bool)}
    with CountingRunner(forcing) as runner:
        runner.reset(1)
        with pytest.raises(StepError, match=message):
            _step(runner, [[1]], 1, **(force if given else {}))
        _step(runner, [[1]], 1, **({} if given else force))
