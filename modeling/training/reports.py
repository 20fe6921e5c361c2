"""What a training run says of itself: after a step, of held-out text, and of its active rate at the end."""

from __future__ import annotations

from dataclasses import dataclass

from dlo_export.modeling.perplexity import perplexity


@dataclass(frozen=True)
class StepReport:
    """A finished step, over all processes.

    Attributes:
        step: How many are done.
        steps: How many there will be.
        loss: Mean language loss of its learned tokens.
        active: Share of tokens that inference would have activated, over the routed layers; None without any.
        tokens_per_second: Without padding.
    """

    step: int
    steps: int
    loss: float
    active: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class HeldOut:
    """What held-out text says.

    Attributes:
        loss: Mean language loss of learned tokens, routed as at inference.
        training_loss: The same, tokens selected as in training.
        active: Share of tokens active at inference, by layer.
    """

    loss: float
    training_loss: float
    active: dict[int, float]

    @property
    def perplexity(self) -> float:
        """Of learned tokens at inference."""
        return perplexity(self.loss, 1)

    @property
    def active_rate(self) -> float | None:
        """Mean over the routed layers; None without any."""
        return sum(self.active.values()) / len(self.active) if self.active else None


@dataclass(frozen=True)
class RateControl:
    """How the active rate at inference was brought to the target when training was over.

    Attributes:
        target: What was asked for, as the mean over the routed layers.
        before: What training came to.
        after: What it is.
        thresholds: By routed layer, where it is not one half; as before where training came near enough.
        other_text: Whether both rates were measured on other held-out text than thresholds are fitted on; False where
            there is a single sequence of it.
    """

    target: float
    before: float
    after: float
    thresholds: dict[int, float]
    other_text: bool
