"""What every runtime's runner of a decoder is: one protocol, its checks made once."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.runtimes.errors import StepError

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
# By routed layer, bool [batch, sequence]: whose MLP runs.
Decisions = Mapping[int, BoolArray]
# Whether a step's decisions may come from outside: as it likes, in every step, or in none.
Forcing = Literal["possible", "required", "impossible"]


def float32(array: np.ndarray) -> FloatArray:
    """The same numbers in float32; the array itself where they are."""
    return array if array.dtype == np.float32 else array.astype(np.float32)


def decisions(router_scores: Mapping[int, FloatArray], thresholds: Mapping[int, float]) -> Decisions:
    """Whose MLP runs, by the rule: a score above its layer's threshold, compared in the scores' own type.

    Args:
        router_scores: By routed layer, float32 [batch, sequence].
        thresholds: By layer, where it is not one half.
    """
    return {layer: scores > np.float32(thresholds.get(layer, ONE_HALF)) for layer, scores in router_scores.items()}


@dataclasses.dataclass(frozen=True)
class StepRequest:
    """What a step is asked for, checked.

    Attributes:
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, past + sequence], 0 at padding.
        position_ids: int64 [batch, sequence].
        force_active: Decisions for every routed layer, bool [batch, sequence]; None lets the routers decide.
        last_logits: Return the last token's logits only.
        hidden_states: Return the residual stream behind every layer, if the model exposes it.
    """

    input_ids: Int64Array
    attention_mask: Int64Array
    position_ids: Int64Array
    force_active: Decisions | None = None
    last_logits: bool = False
    hidden_states: bool = False

    @property
    def sequence(self) -> int:
        """Tokens per sequence."""
        return int(self.input_ids.shape[1])

    def pass_on(self, runner: Runner) -> StepResult:
        """Asks another runner for the same."""
        return runner.step(
            self.input_ids,
            self.attention_mask,
            self.position_ids,
            force_active=self.force_active,
            last_logits=self.last_logits,
            hidden_states=self.hidden_states,
        )


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step computes, for the tokens of that step.

    Attributes:
        logits: float32 [batch, sequence, vocab], or [batch, 1, vocab] where only the last token's were asked for.
        router_scores: By routed layer, float32 [batch, sequence]; empty where the model does not expose them.
        hidden_states: By layer, the residual stream behind it, float32 [batch, sequence, hidden]; empty where not
            asked for or not exposed.
    """

    logits: FloatArray
    router_scores: Mapping[int, FloatArray]
    hidden_states: Mapping[int, FloatArray]


class Runner(abc.ABC):
    """A decoder with its KV cache, which lives inside the runner from one `reset` to the next.

    A context manager: leaving it frees the model. A runtime says how to empty the cache, compute a checked step, and
    free the model; everything else is here. A `StepError` leaves the cache as it was; behind any other error nobody
    knows what of it was written, and the runner asks for a `reset`.

    Attributes:
        name: For reports.
        num_layers: Decoder layers.
        routed_layers: Layers whose routing the model exposes, ascending. A released graph hides its routers.
        thresholds: By routed layer, the score that an active token's exceeds, where it is not one half.
        last_logits_only: Whether the model computes no other logits than each step's last.
        max_step: Tokens per sequence that one step takes at most; None: any number.
    """

    def __init__(
        self,
        name: str,
        *,
        num_layers: int,
        routed_layers: tuple[int, ...] = (),
        thresholds: Mapping[int, float] | None = None,
        forcing: Forcing = "possible",
        last_logits_only: bool = False,
        takes_padding: bool = True,
        max_step: int | None = None,
    ) -> None:
        self.name = name
        self.last_logits_only = last_logits_only
        self.max_step = max_step
        self.num_layers = num_layers
        self.routed_layers = routed_layers
        self.thresholds = dict(thresholds or {})
        self._forcing = forcing
        self._takes_padding = takes_padding
        self._batch: int | None = None
        self._past = 0
        self._closed = False

    def reset(self, batch: int) -> None:
        """Empties the cache, for sequences of a new batch.

        Raises:
            StepError: The runner was closed, or the batch is larger than the model takes.
            ModelInterfaceError: The model is of another, fixed batch.
        """
        self._check_open()
        with self._changing_cache():
            self._empty_cache(batch)
        self._batch, self._past = batch, 0

    def step(
        self,
        input_ids: Int64Array,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        *,
        force_active: Decisions | None = None,
        last_logits: bool = False,
        hidden_states: bool = False,
    ) -> StepResult:
        """Feeds the next tokens of every sequence and appends them to the cache.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, past + sequence], 0 at padding.
            position_ids: int64 [batch, sequence].
            force_active: Decisions in place of the routers', for every routed layer: bool [batch, sequence].
            last_logits: Return the last token's logits only.
            hidden_states: Return the residual stream behind every layer, if the model exposes it.

        Raises:
            StepError: The runner was closed or not reset; shapes contradict each other or the cache; decisions are
                missing, or for layers without router; all tokens' logits are asked for of a model that has the
                last's only; the step does not fit, or the runtime fails.
        """
        self._check_open()
        request = StepRequest(input_ids, attention_mask, position_ids, force_active, last_logits, hidden_states)
        self._check_shapes(request)
        self._check_forcing(request.force_active)
        if self.last_logits_only and not last_logits and request.sequence > 1:
            raise StepError(
                f"{self.name}: computes the last token's logits only, and those of all {request.sequence} tokens were "
                "asked for",
                hint="ask for last_logits, or export without --last-logits (of an engine, --trt-last-logits)",
            )
        self._check_padding(request.attention_mask)
        with self._changing_cache():
            result = self._compute(request)
        self._past += request.sequence
        return result

    def fork(self, branches: int) -> None:
        """Turns the one cached sequence into so many equal ones, which the next steps continue differently.

        Raises:
            StepError: The runner was closed, has not one sequence with tokens, or cannot copy its cache.
        """
        self._check_open()
        if self._batch != 1 or not self._past:
            raise StepError(
                f"{self.name}: was asked to fork {self._batch or 'no'} sequences of {self._past} tokens, expected one "
                "with tokens",
                hint="call reset(1) and step before it",
            )
        with self._changing_cache():
            self._repeat_cache(branches)
        self._batch = branches

    def active(self, router_scores: Mapping[int, FloatArray]) -> Decisions:
        """The decisions that these scores mean, by layer."""
        return decisions(router_scores, self.thresholds)

    def close(self) -> None:
        """Frees the model; arrays handed out stay valid. Once is enough, twice does no harm."""
        if not self._closed:
            self._closed = True
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _empty_cache(self, batch: int) -> None:
        """Starts over with so many sequences; raises StepError, the old cache untouched, where they do not fit."""

    def _repeat_cache(self, branches: int) -> None:
        """Copies the one sequence's cache for each branch; raises StepError where the runtime has no way to."""
        raise StepError(
            f"{self.name}: cannot copy its cache for {branches} branches", hint="run the sequences one by one"
        )

    @abc.abstractmethod
    def _compute(self, request: StepRequest) -> StepResult:
        """Runs one step and appends it to the cache, or raises StepError."""

    @abc.abstractmethod
    def _free(self) -> None:
        """Drops model and cache; called once."""

    @contextlib.contextmanager
    def _changing_cache(self) -> Iterator[None]:
        """Behind an error other than StepError there is no batch any more, so that no step runs on half a cache."""
        try:
            yield
        except StepError:
            raise
        except BaseException:
            self._batch = None
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise StepError(f"{self.name}: was asked for a step after the runner was closed", hint="open it again")

    def _check_shapes(self, request: StepRequest) -> None:
        """Collects everything that is wrong with a step's arguments."""
        if self._batch is None:
            raise StepError(
                f"{self.name}: step before reset",
                hint="call reset(batch) before the first step, and behind an error in the midst of one",
            )
        input_ids, force_active = request.input_ids, request.force_active
        problems = []
        if input_ids.ndim != 2 or input_ids.shape[0] != self._batch or input_ids.shape[1] == 0:
            problems.append(f"input_ids has shape {list(input_ids.shape)}, expected [{self._batch}, sequence >= 1]")
        else:
            step = (self._batch, request.sequence)
            given = {
                "attention_mask": (request.attention_mask, (self._batch, self._past + request.sequence)),
                "position_ids": (request.position_ids, step),
                **{f"force_active[{layer}]": (force, step) for layer, force in sorted((force_active or {}).items())},
            }
            problems += [
                f"{name} has shape {list(array.shape)}, expected {list(shape)}"
                for name, (array, shape) in given.items()
                if array.shape != shape
            ]
        if force_active is not None and tuple(sorted(force_active)) != self.routed_layers:
            problems.append(f"force_active is for layers {sorted(force_active)}, expected {list(self.routed_layers)}")
        if problems:
            raise StepError(
                f"{self.name}: {'; '.join(problems)}", hint="the mask covers the cached tokens and the step's"
            )

    def _check_padding(self, attention_mask: Int64Array) -> None:
        """A model that counts tokens would take padding for them, and compute something else without a word."""
        if not self._takes_padding and not attention_mask.all():
            raise StepError(
                f"{self.name}: got a batch with padding, but its attention counts tokens, whatever they are",
                hint="run sequences of one length together, or one by one",
            )

    def _check_forcing(self, force_active: Decisions | None) -> None:
        """Decisions come if, and only if, the model takes them."""
        if force_active is None and self._forcing == "required":
            raise StepError(
                f"{self.name}: takes its decisions from outside and got none, expected layers "
                f"{list(self.routed_layers)}",
                hint="give force_active to every step, or run a graph whose routers decide",
            )
        if force_active and self._forcing == "impossible":
            raise StepError(
                f"{self.name}: has no inputs for decisions, so they cannot be given to it",
                hint="run a parity build of the graph",
            )
