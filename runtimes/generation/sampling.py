"""Choose the next token from logits: greedy, or by temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses

import numpy as np

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.runner import FloatArray, Int64Array


class SamplingError(RuntimeInputError):
    """A sampling parameter is out of range."""


class LogitsError(RuntimeInputError):
    """A model computed no numbers to choose by."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedy by default.

    Attributes:
        temperature: Logits are divided by it; 0 for greedy.
        top_k: Keep only so many most likely tokens; 0 for all.
        top_p: Of those, keep the most likely ones whose probabilities sum to at least this.
        seed: The same seed, model and prompts give the same tokens.

    Raises:
        SamplingError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}, expected a number >= 0 (0: greedy)")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, expected >= 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.seed < 0:
            problems.append(f"seed is {self.seed}, expected >= 0")
        if problems:
            raise SamplingError(
                f"sampling: {'; '.join(problems)}",
                hint="temperature 0 takes the most likely token, whatever the others",
            )


class Sampler:
    """Draws tokens, one per sequence and call.

    Args:
        sampling: How.
        batch: Sequences. Each has a random stream of its own, so that a sequence's tokens do not depend on its
            neighbours' lengths.
    """

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self._sampling = sampling
        self._generators = [np.random.default_rng([sampling.seed, row]) for row in range(batch)]

    def __call__(self, logits: FloatArray) -> Int64Array:
        """Chooses from logits float32 [batch, vocab]; returns int64 [batch].

        Raises:
            LogitsError: A sequence's largest logit is not finite.
        """
        highest = logits.max(-1)  # NaN where any is
        if not np.isfinite(highest).all():
            raise LogitsError(
                f"logits: the largest are {highest.tolist()}, expected finite numbers",
                hint="a weight is damaged, or fp16 too narrow for the model: export it again, with --dtype fp32",
            )
        if self._sampling.temperature == 0:
            likeliest: Int64Array = logits.argmax(-1).astype(np.int64)
            return likeliest
        drawn = [self._draw(*pair) for pair in zip(logits, self._generators, strict=True)]
        return np.array(drawn, np.int64)

    def _draw(self, logits: FloatArray, generator: np.random.Generator) -> int:
        tokens, probabilities = kept_tokens(logits, self._sampling)
        return int(generator.choice(tokens, p=probabilities))


def kept_tokens(logits: FloatArray, sampling: Sampling) -> tuple[Int64Array, np.ndarray]:
    """Tokens that may be drawn, most likely first, and their probabilities.

    Args:
        logits: float32 [vocab].
        sampling: With a temperature above 0.

    Returns:
        int64 [kept] and float64 [kept], which sums to 1.
    """
    count = min(sampling.top_k or logits.size, logits.size)
    tokens = np.argpartition(-logits, count - 1)[:count] if count < logits.size else np.arange(logits.size)
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    scaled = logits[tokens].astype(np.float64)
    # Shifted first: a tiny temperature would turn the quotient of a positive logit into infinity.
    weights = np.exp((scaled - scaled[0]) / sampling.temperature)
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = before < sampling.top_p
    return tokens[kept], probabilities[kept] / probabilities[kept].sum()
