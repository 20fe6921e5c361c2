from __future__ import annotations

import numpy as np
import pytest

from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.static_cache.batches import StaticCache, StaticCacheLimits


def _cache(batch: int, **limits: int) -> StaticCache:
    cache = StaticCache("engine", StaticCacheLimits(**{"max_cache": 8, **limits}))
    cache.reset(batch)
    return cache


def test_step_is_right_ragged_when_the_batch_is_left_padded() -> None:
    cache = _cache(2)
    ids, mask = np.array([[0, 0, 5], [6, 7, 8]]), np.array([[0, 0, 1], [1, 1, 1]])
    (step,) = cache.next_steps(ids, mask, np.array([[0, 0, 0], [0, 1, 2]]), {4: np.array([[1, 1, 1], [1, 0, 1]], bool)})
    np.testing.assert_array_equal(step.feeds["input_ids"], [[5, 0, 0], [6, 7, 8]])
    np.testing.assert_array_equal(step.feeds["position_ids"], [[0, 0, 0], [0, 1, 2]])
    np.testing.assert_array_equal(step.feeds["write_indices"], [0, 0])
    np.testing.assert_array_equal(step.feeds["kv_lengths"], [1, 3])
    np.testing.assert_array_equal(step.feeds["force_active.4"], [[True, False, False], [True, False, True]])
    assert {array.dtype for name, array in step.feeds.items() if "." not in name} == {np.dtype(np.int64)}


def test_results_are_put_back_when_tokens_were_moved() -> None:
    cache = _cache(2)
    (step,) = cache.next_steps(np.zeros((2, 3), np.int64), np.array([[0, 0, 1], [1, 1, 1]]), np.zeros((2, 3), np.int64))
    computed = np.array([[[1.0], [9], [9]], [[2], [3], [4]]])
    np.testing.assert_array_equal(step.restored(computed)[..., 0], [[0, 0, 1], [2, 3, 4]])
    np.testing.assert_array_equal(step.last(computed)[..., 0], [[1], [4]])
    np.testing.assert_array_equal(step.last(np.array([[[1.0]], [[4]]]))[..., 0], [[1], [4]])


def test_next_step_goes_on_where_each_sequence_ended_when_decoding() -> None:
    cache = _cache(2)
    mask = np.array([[0, 0, 1], [1, 1, 1]])
    cache.append(cache.next_steps(np.zeros((2, 3), np.int64), mask, np.zeros((2, 3), np.int64)))
    mask = np.concatenate([mask, [[1], [0]]], 1)  # the second sequence has ended
    (step,) = cache.next_steps(np.array([[5], [0]]), mask, np.array([[1], [3]]))
    np.testing.assert_array_equal(step.feeds["write_indices"], [1, 3])
    np.testing.assert_array_equal(step.feeds["kv_lengths"], [2, 3])
    assert (cache.past, step.ragged) == (3, 1)
    np.testing.assert_array_equal(step.last(np.ones((2, 1, 2))), [[[1, 1]], [[0, 0]]])


def test_step_keeps_one_column_when_all_of_it_is_padding() -> None:
    (step,) = _cache(1).next_steps(np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64))
    assert step.feeds["input_ids"].shape == (1, 1)
    np.testing.assert_array_equal(step.feeds["kv_lengths"], [0])
    np.testing.assert_array_equal(step.restored(np.ones((1, 1))), [[0, 0]])


@pytest.mark.parametrize("seed", range(20))
def test_conversion_loses_nothing_when_batches_are_random(seed: int) -> None:
    """A reference written the slow way: each row's real tokens, one after the other."""
    rng = np.random.default_rng(seed)
    batch, cache = int(rng.integers(1, 5)), StaticCache("engine", StaticCacheLimits(100))
    cache.reset(batch)
    mask = np.zeros((batch, 0), np.int64)
    for _ in range(4):
        shape = (batch, int(rng.integers(1, 7)))
        ids, positions = rng.integers(1, 50, shape), rng.integers(0, 50, shape)
        real = rng.integers(0, 2, shape)
        lengths = mask.sum(1)
        mask = np.concatenate([mask, real], 1)
        (step,) = cache.next_steps(ids, mask, positions)
        cache.append([step])
        for row in range(batch):
            kept = ids[row][real[row] == 1].tolist()
            assert step.feeds["input_ids"][row].tolist() == kept + [0] * (step.ragged - len(kept))
            assert step.feeds["write_indices"][row] == lengths[row]
            assert step.feeds["kv_lengths"][row] == lengths[row] + len(kept)
        np.testing.assert_array_equal(step.restored(step.feeds["input_ids"]), ids * real)
        np.testing.assert_array_equal(step.restored(step.feeds["position_ids"]), positions * real)


@pytest.mark.parametrize("seed", range(40))
def test_live_slots_keep_their_tokens_when_padding_has_no_room(seed: int) -> None:
    """Rows written as a graph does, padding too: to the end of each, into slots that are there."""
    rng = np.random.default_rng(seed)
    batch, slots = int(rng.integers(2, 5)), int(rng.integers(3, 9))
    cache = StaticCache("engine", StaticCacheLimits(slots))
    cache.reset(batch)
    mask, held, written = np.zeros((batch, 0), np.int64), [[] for _ in range(batch)], np.zeros((batch, slots), np.int64)
    while (rooms := slots - mask.sum(1)).any():
        columns = int(rng.integers(1, rooms.max() + 1))
        counts = [rng.integers(0, min(room, columns) + 1) for room in rooms]
        real = np.array([rng.permutation(columns) < count for count in counts])
        ids = rng.integers(1, 1000, real.shape)
        steps = cache.next_steps(ids, np.concatenate([mask, real], 1), np.zeros_like(ids))
        assert len(steps) == 1 or (rooms < columns).any()
        after = [tokens + ids[row][real[row]].tolist() for row, tokens in enumerate(held)]
        for run in (steps[:-1], steps):  # the last one fails, and all are repeated
            for step in run:
                starts, ends = step.feeds["write_indices"], step.feeds["kv_lengths"]
                assert (starts + step.ragged <= slots).all()
                for row, start in enumerate(starts):
                    written[row, start : start + step.ragged] = step.feeds["input_ids"][row]
                for row in np.flatnonzero(step.counts):
                    assert written[row, : ends[row]].tolist() == after[row][: ends[row]]
            for row in np.flatnonzero(rooms):
                assert written[row, : len(held[row])].tolist() == held[row]
        np.testing.assert_array_equal(sum(step.restored(step.feeds["input_ids"]) for step in steps), ids * real)
        cache.append(steps)
        mask, held = np.concatenate([mask, real], 1), after


def test_step_names_the_option_when_the_cache_is_full() -> None:
    cache = _cache(2)
    mask = np.array([[1] * 7, [0] * 6 + [1]])
    cache.append(cache.next_steps(np.zeros((2, 7), np.int64), mask, np.zeros((2, 7), np.int64)))
    with pytest.raises(
        StepError, match="sequence 0 has 7 tokens in it and the step adds 2, expected at most 8"
    ) as info:
        cache.next_steps(
            np.zeros((2, 2), np.int64), np.concatenate([mask, np.ones((2, 2), int)], 1), np.zeros((2, 2), np.int64)
        )
    assert "--trt-max-cache 9" in str(info.value)
    assert cache.past == 7


def test_step_collects_problems_when_it_fits_neither_profile_nor_cache() -> None:
    cache = _cache(1, max_sequence=4)
    mask = np.ones((1, 9), np.int64)
    with pytest.raises(StepError) as info:
        cache.next_steps(np.zeros((1, 9), np.int64), mask, np.zeros((1, 9), np.int64))
    text = str(info.value)
    assert "the step has 9 tokens per sequence, expected at most 4" in text
    assert "--trt-max-sequence 9" in text
    assert "--trt-max-cache 9" in text


def test_reset_names_the_option_when_the_batch_is_beyond_the_profile() -> None:
    with pytest.raises(StepError, match=r"a batch of 3, expected at most 2[\s\S]*--trt-max-batch 3"):
        _cache(3, max_batch=2)


def test_step_refuses_when_the_mask_hides_tokens_that_are_cached() -> None:
    cache = _cache(1)
    cache.append(cache.next_steps(np.zeros((1, 2), np.int64), np.ones((1, 2), np.int64), np.zeros((1, 2), np.int64)))
    with pytest.raises(StepError, match=r"hides other cached tokens of sequences \[0\]"):
        cache.next_steps(np.zeros((1, 1), np.int64), np.array([[0, 1, 1]]), np.zeros((1, 1), np.int64))
