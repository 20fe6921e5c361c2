from __future__ import annotations

import re

import numpy as np
import pytest

from dlo_export.runtimes.errors import BackendUnavailableError, ModelInterfaceError, ModelLoadError, StepError
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.static_cache_runner import StaticCacheRunner
from dlo_export.runtimes.parity.cases import Case, step_feeds
from dlo_export.runtimes.parity.compare import Candidate, compare
from tests.runtimes.feeding import feed, joined_logits
from tests.runtimes.static_cache_graphs import HEAD_DIM, KV_HEADS, LAYERS, MAX_CACHE, VOCAB, decoder, rename_dimension

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


def _cases() -> list[Case]:
    ragged = [np.array(prompt) for prompt in PROMPTS]
    return [
        Case("prefill", step_feeds(ragged)),
        Case("chunk and decode", step_feeds(ragged, 3, 1, 1)),
        Case("mixed decisions", step_feeds(ragged, 2, 1), "mixed"),
        Case("nothing active", step_feeds(ragged, 1), "none"),
    ]


def test_static_cache_agrees_with_a_growing_one_when_parity_compares_them() -> None:
    with OnnxRuntimeRunner(decoder("growing", force=False), name="growing", threads=1) as reference:
        # Its own routers decide in the reference, which trace_reference then forces on the candidate.
        report = compare(
            reference,
            [
                Candidate(
                    "static",
                    lambda: StaticCacheRunner(decoder("static", scores=False), threads=1),
                    lambda: StaticCacheRunner(decoder("static", force=True), threads=1),
                )
            ],
            [case for case in _cases() if case.forcing is None],
            dtype="fp32",
            greedy_prompts=PROMPTS,
            greedy_tokens=8,
        )
    assert report, report.summary()
    assert sum(case.decisions for case in report.cases) > 50
    assert max(case.logits.largest_absolute for case in report.cases) < 5e-4


def test_static_cache_obeys_decisions_when_they_are_forced() -> None:
    with (
        OnnxRuntimeRunner(decoder("growing", force=True), threads=1) as growing,
        StaticCacheRunner(decoder("static", force=True), threads=1) as static,
    ):
        assert static.routed_layers == growing.routed_layers == (0, 1)
        report = compare(growing, [Candidate("static", lambda: static)], _cases()[2:], dtype="fp32")
    assert report, report.summary()


def test_hidden_states_come_back_in_place_when_asked_for() -> None:
    samples = [np.array([prompt]) for prompt in PROMPTS]
    with (
        OnnxRuntimeRunner(decoder("growing"), threads=1) as growing,
        StaticCacheRunner(decoder("static"), threads=1) as static,
    ):
        (wanted, found), mask = [feed(runner, samples, hidden_states=True)[0][0] for runner in (growing, static)], None
        assert feed(static, samples)[0][0].hidden_states == {}
    mask = np.array([[0] * (8 - len(p)) + [1] * len(p) for p in PROMPTS], bool)
    for layer in range(LAYERS):
        np.testing.assert_allclose(found.hidden_states[layer][mask], wanted.hidden_states[layer][mask], atol=1e-5)
        assert not found.hidden_states[layer][~mask].any()
        assert not found.router_scores[layer][~mask].any()


def test_last_logits_are_the_same_when_the_graph_keeps_no_others() -> None:
    samples = [np.array([prompt]) for prompt in PROMPTS]
    with (
        StaticCacheRunner(decoder("static"), threads=1) as full,
        StaticCacheRunner(decoder("static", last_logits=True), threads=1) as last,
    ):
        for cached in (0, 2):
            wanted, found = (joined_logits(feed(r, samples, cached, last_logits=True)[0]) for r in (full, last))
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        tokens = [generate(runner, PROMPTS, max_new_tokens=6).sequences for runner in (full, last)]
        assert tokens[0] == tokens[1]
        with pytest.raises(StepError, match=r"those of all 8 tokens were asked for[\s\S]*--trt-last-logits"):
            feed(last, samples)


def test_generation_goes_on_when_a_sequence_has_ended() -> None:
    with OnnxRuntimeRunner(decoder("growing"), threads=1) as growing:
        free = generate(growing, PROMPTS, max_new_tokens=8).sequences
        ends = {free[0][2]}
        wanted = generate(growing, PROMPTS, max_new_tokens=8, end_tokens=ends).sequences
    with StaticCacheRunner(decoder("static"), threads=1) as static:
        assert generate(static, PROMPTS, max_new_tokens=8, end_tokens=ends).sequences == wanted


@pytest.mark.parametrize("provider", [CPU, Provider(CPU.name, reads_back=True)], ids=["of the host", "read back"])
def test_generation_goes_on_when_a_sequence_has_ended_with_its_last_slot_taken(provider: Provider) -> None:
    prompts = [np.random.default_rng(1).integers(1, VOCAB, MAX_CACHE - 4).tolist(), *PROMPTS]
    with OnnxRuntimeRunner(decoder("growing"), threads=1) as growing:
        ends = {generate(growing, prompts, max_new_tokens=5).sequences[0][-1]}
        wanted = generate(growing, prompts, max_new_tokens=12, end_tokens=ends).sequences
    assert len(wanted[0]) == 5
    assert max(map(len, wanted)) == 12
    with StaticCacheRunner(decoder("static"), threads=1, provider=provider) as static:
        assert generate(static, prompts, max_new_tokens=12, end_tokens=ends).sequences == wanted
        with pytest.raises(StepError, match=rf"sequence 0 has {MAX_CACHE} tokens in it and the step adds 1"):
            generate(static, prompts, max_new_tokens=12)


@pytest.mark.parametrize("last_logits", [False, True])
def test_sequences_rest_and_go_on_when_others_take_more_tokens_than_they_have_slots_left(last_logits: bool) -> None:
    rng = np.random.default_rng(2)
    # By sequence, how many tokens each step gives it: the first is soon full, the second rests with two slots left.
    counts = np.array([[20, 4, 0, 0], [22, 0, 0, 2], [3, 2, 9, 1]])
    columns = counts.max(0)
    mask = np.concatenate([np.arange(n)[::-1] < counts[:, [i]] for i, n in enumerate(columns)], 1).astype(np.int64)
    ids = rng.integers(1, VOCAB, mask.shape)
    found = []
    with (
        OnnxRuntimeRunner(decoder("growing"), threads=1) as growing,
        StaticCacheRunner(decoder("static"), threads=1) as static,
    ):
        for runner in (growing, static):
            runner.reset(len(counts))
            stops = columns.cumsum()
            found.append(
                [
                    runner.step(
                        ids[:, stop - size : stop],
                        mask[:, :stop],
                        np.maximum(mask.cumsum(1) - 1, 0)[:, stop - size : stop],
                        last_logits=last_logits,
                        hidden_states=True,
                    )
                    for size, stop in zip(columns, stops, strict=True)
                ]
            )
    for number, (wanted, got) in enumerate(zip(*found, strict=True)):
        real = mask[:, columns[:number].sum() : columns[: number + 1].sum()].astype(bool)
        logits = real[:, -1:] if last_logits else real
        assert got.logits.shape == wanted.logits.shape
        np.testing.assert_allclose(got.logits[logits], wanted.logits[logits], atol=1e-4)
        assert not got.logits[~logits].any()
        for layer in range(LAYERS):
            for name in ("router_scores", "hidden_states"):
                values, expected = getattr(got, name)[layer], getattr(wanted, name)[layer]
                np.testing.assert_allclose(values[real], expected[real], atol=1e-4)
                assert not values[~real].any()


@pytest.mark.parametrize("most", [1, 3])
def test_prompt_is_fed_in_steps_that_the_largest_profile_takes(most: int) -> None:
    with (
        StaticCacheRunner(decoder("static"), threads=1) as free,
        StaticCacheRunner(decoder("static"), threads=1, max_sequence=most) as bounded,
    ):
        assert max(map(len, PROMPTS)) > most
        wanted, found = (generate(runner, PROMPTS, max_new_tokens=4).sequences for runner in (free, bounded))
        assert found == wanted


def test_reset_says_what_a_cache_takes_when_no_memory_holds_it() -> None:
    slots = 2**40
    model = decoder("static")
    for layer in range(LAYERS):
        for part in ("key", "value"):
            model = rename_dimension(model, f"past_key_values.{layer}.{part}", 2, slots)
            model = rename_dimension(model, f"present.{layer}.{part}", 2, slots)
    with StaticCacheRunner(model, threads=1) as runner:
        with pytest.raises(BackendUnavailableError) as error:
            runner.reset(3)
        takes = 3 * 2 * LAYERS * KV_HEADS * slots * HEAD_DIM * 4 // 2**30
        said = (
            rf"a KV cache of {slots:,} slots for each of 3 sequences takes {takes:,}\.0 GB, and [\d,.]+ [GM]B of memory"
        )
        assert re.search(said, error.value.message), error.value.message
        assert error.value.hint == "run fewer sequences at once, or export with a smaller --trt-max-cache"
        assert error.value.exit_code == 4
        with pytest.raises(StepError, match="step before reset"):
            runner.step(np.ones((3, 1), np.int64), np.ones((3, 1), np.int64), np.zeros((3, 1), np.int64))


def test_runner_stays_usable_when_a_step_did_not_fit() -> None:
    with StaticCacheRunner(decoder("static"), threads=1, max_batch=2, max_sequence=20) as runner:
        with pytest.raises(StepError, match="--trt-max-batch 3"):
            runner.reset(3)
        prompt = [np.arange(20)[np.newaxis] % VOCAB]
        (first,), _ = feed(runner, prompt)
        ids, mask = np.array([[1] * 5]), np.ones((1, 25), np.int64)
        with pytest.raises(StepError, match=rf"expected at most {MAX_CACHE} together[\s\S]*--trt-max-cache 25"):
            runner.step(ids, mask, np.arange(20, 25)[np.newaxis])
        runner.step(ids[:, :4], mask[:, :24], np.arange(20, 24)[np.newaxis])
        (again,), _ = feed(runner, prompt)
        np.testing.assert_array_equal(first.logits, again.logits)


def test_step_is_refused_when_decisions_are_missing_or_unwanted() -> None:
    one = np.array([[1]])
    with StaticCacheRunner(decoder("static", force=True), threads=1) as forced:
        with pytest.raises(StepError, match="step before reset"):
            forced.step(one, one, one)
        forced.reset(1)
        with pytest.raises(StepError, match="got none"):
            forced.step(one, one, one)
    with pytest.raises(StepError, match="after the runner was closed"):
        forced.step(one, one, one, force_active=dict.fromkeys(range(LAYERS), one > 0))
    with StaticCacheRunner(decoder("static"), threads=1) as free:
        free.reset(1)
        with pytest.raises(StepError, match="cannot be given to it"):
            free.step(one, one, one, force_active=dict.fromkeys(range(LAYERS), one > 0))


def test_model_is_refused_when_it_has_no_static_cache() -> None:
    with pytest.raises(ModelInterfaceError, match=r"attention_mask.*are unknown") as info:
        StaticCacheRunner(decoder("growing"), threads=1)
    assert "['kv_lengths', 'write_indices'] are missing" in str(info.value)
    assert "the cache's lengths are" in str(info.value)
    with pytest.raises(ModelInterfaceError, match="expected one number for all layers"):
        StaticCacheRunner(rename_dimension(decoder("static"), "past_key_values.1.key", 2, 12), threads=1)
    with pytest.raises(ModelLoadError, match="no such file"):
        StaticCacheRunner("nowhere.onnx")
