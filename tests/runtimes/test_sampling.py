from __future__ import annotations

import numpy as np
import pytest

from dlo_export.runtimes.generation.sampling import LogitsError, Sampler, Sampling, SamplingError, kept_tokens


def test_kept_tokens_shrink_when_top_k_and_top_p_are_given() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))
    tokens, probabilities = kept_tokens(logits, Sampling(temperature=1.0))
    assert tokens.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(probabilities, [0.5, 0.35, 0.1, 0.05], rtol=1e-5)
    assert kept_tokens(logits, Sampling(temperature=1.0, top_p=0.51))[0].tolist() == [1, 3]
    assert kept_tokens(logits, Sampling(temperature=1.0, top_p=0.49))[0].tolist() == [1]
    tokens, probabilities = kept_tokens(logits, Sampling(temperature=1.0, top_k=3, top_p=0.9))
    assert tokens.tolist() == [1, 3, 0]
    np.testing.assert_allclose(probabilities.sum(), 1)
    flatter = kept_tokens(logits, Sampling(temperature=2.0))[1]
    np.testing.assert_allclose(flatter[0] / flatter[1], np.sqrt(0.5 / 0.35), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 49])
def test_kept_tokens_are_the_likeliest_ones_when_top_k_alone_is_given(count: int) -> None:
    logits = np.random.default_rng(count).standard_normal(50).astype(np.float32)
    likeliest = np.argsort(-logits)
    tokens, probabilities = kept_tokens(logits, Sampling(temperature=1.0, top_k=count))
    assert tokens.tolist() == likeliest[:count].tolist()
    np.testing.assert_allclose(probabilities, np.exp(logits[tokens]) / np.exp(logits[tokens]).sum(), rtol=1e-5)
    for everything in (50, 60):
        assert kept_tokens(logits, Sampling(temperature=1.0, top_k=everything))[0].tolist() == likeliest.tolist()


def test_sampler_draws_by_probability_when_the_temperature_is_above_zero() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    sampler = Sampler(Sampling(temperature=1.0), 1)
    drawn = np.bincount([int(sampler(logits)[0]) for _ in range(2000)], minlength=3) / 2000
    np.testing.assert_allclose(drawn, [0.7, 0.2, 0.1], atol=0.05)
    tiny = Sampler(Sampling(temperature=1e-30), 1)
    assert tiny(logits * 1000).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sampler_raises_when_a_logit_is_not_finite(temperature: float, value: float) -> None:
    logits = np.array([[0.7, value, 0.1]], np.float32)
    with pytest.raises(LogitsError, match="expected finite"):
        Sampler(Sampling(temperature=temperature), 1)(logits)


def test_sampler_draws_when_some_tokens_are_ruled_out() -> None:
    logits = np.array([[-np.inf, 1.0, -np.inf]], np.float32)
    assert Sampler(Sampling(temperature=1.0), 1)(logits).tolist() == [1]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_sampling_raises_when_a_value_is_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(SamplingError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
