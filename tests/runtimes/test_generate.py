from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dlo_export.modeling.llama_dlo  # noqa: F401 - registers the routed models with AutoModelForCausalLM
from dlo_export.runtimes.generation.generate import Generation, GenerationError, generate
from dlo_export.runtimes.generation.sampling import Sampling
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.runtimes.graphs import DATA, Builds

PROMPTS = [[5, 17, 90, 3], [44, 8], [101, 102, 103, 7, 9, 12, 1]]


def _transformers_greedy(prompt: list[int], tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(DATA / "reference_mlp_routed")
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(output[0, len(prompt) :].tolist())


def test_greedy_tokens_equal_transformers_when_prompts_are_left_padded(builds: Builds) -> None:
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        generation = generate(runner, PROMPTS, max_new_tokens=10)
    assert generation.sequences == [_transformers_greedy(prompt, 10) for prompt in PROMPTS]
    assert generation.stats.active_rate == {}


def test_sequence_stops_and_leaves_others_unchanged_when_it_meets_an_end_token(builds: Builds) -> None:
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        whole = generate(runner, PROMPTS, max_new_tokens=10).sequences
        end = next(token for token in whole[0][2:] if token not in whole[1])
        generation = Generation(runner, PROMPTS, max_new_tokens=10, end_tokens={end})
        steps = list(generation)
    for full, cut in zip(whole, generation.sequences, strict=True):
        length = full.index(end) + 1 if end in full else 10
        assert cut == full[:length]
    assert len(generation.sequences[0]) < 10 == len(generation.sequences[1])
    assert [step[0] for step in steps] == generation.sequences[0] + [None] * (10 - len(generation.sequences[0]))


def test_generation_stops_early_when_every_sequence_has_ended(builds: Builds) -> None:
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        first = generate(runner, PROMPTS[:1], max_new_tokens=1).sequences[0][0]
        generation = generate(runner, PROMPTS[:1], max_new_tokens=10, end_tokens=[first])
    assert generation.sequences == [[first]]
    assert generation.stats.tokens_per_second == 0


def test_stats_count_tokens_and_active_rate_when_scores_are_exposed(builds: Builds) -> None:
    with OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1) as runner:
        start = time.perf_counter()
        generation = generate(runner, PROMPTS, max_new_tokens=4)
        seconds = time.perf_counter() - start
        alone = generate(runner, PROMPTS[1:2], max_new_tokens=4)
        # The same tokens in one pass, without padding: a prompt, and all new tokens but the last, which is not fed.
        fed = np.array([PROMPTS[1] + alone.sequences[0][:-1]])
        runner.reset(1)
        scores = runner.step(fed, np.ones_like(fed), np.arange(fed.size)[np.newaxis]).router_scores
    assert (generation.stats.prompt_tokens, generation.stats.new_tokens) == (13, 12)
    assert generation.stats.prefill_seconds > 0 < generation.stats.decode_seconds
    assert generation.stats.prefill_seconds + generation.stats.decode_seconds < seconds
    # The first token of every sequence comes of the prompt.
    assert generation.stats.tokens_per_second == pytest.approx(9 / generation.stats.decode_seconds)
    assert sorted(generation.stats.active_rate) == [0, 1, 3]
    assert alone.stats.active_rate == pytest.approx({layer: (s > 0.5).mean() for layer, s in scores.items()})


@pytest.mark.parametrize("prefill_tokens", [1, 3, 6])
def test_tokens_and_rates_are_the_same_when_prompts_are_fed_in_pieces(builds: Builds, prefill_tokens: int) -> None:
    # In the first pieces, the shorter prompts are nothing but padding.
    with OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1) as runner:
        whole = generate(runner, PROMPTS, max_new_tokens=4)
        pieces = generate(runner, PROMPTS, max_new_tokens=4, prefill_tokens=prefill_tokens)
    assert pieces.sequences == whole.sequences
    assert pieces.stats.active_rate == whole.stats.active_rate


def test_sampled_tokens_repeat_when_the_seed_does(builds: Builds) -> None:
    def sampled(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        with OnnxRuntimeRunner(builds.released, threads=1) as runner:
            return generate(runner, PROMPTS, max_new_tokens=8, sampling=sampling).sequences

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(("prompts", "tokens"), [([], 1), ([[1], []], 1), ([[1]], 0)])
def test_generation_raises_when_there_is_nothing_to_do(builds: Builds, prompts: list[list[int]], tokens: int) -> None:
    with OnnxRuntimeRunner(builds.released, threads=1) as runner, pytest.raises(GenerationError, match="hint"):
        Generation(runner, prompts, max_new_tokens=tokens)
