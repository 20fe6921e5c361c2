"""Measures any model on texts and tasks.

From Python, for a model in memory::

    plan = plan_evaluation(Tokenizer(folder), [read_text(path)], [read_task(requests)], EvaluationSettings())
    evaluation = evaluate(TorchScorer(model), plan)

The plan holds tokens: it serves every model of the same tokenizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlo_export.runtimes.evaluation.encoding import EncodedTask, EncodedText, encode_task, encode_text
from dlo_export.runtimes.evaluation.errors import EvaluationError
from dlo_export.runtimes.evaluation.perplexity import Perplexity, measure_perplexity
from dlo_export.runtimes.evaluation.requests import Task
from dlo_export.runtimes.evaluation.scorer import TokenScorer
from dlo_export.runtimes.evaluation.tasks import TaskResult, measure_task
from dlo_export.runtimes.evaluation.texts import Text
from dlo_export.runtimes.generation.tokenizer import Tokenizer

DEFAULT_SEQUENCE = 1024

Stage = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]
"""Shows that a text or task, named, is being measured; gives what to call with (done, in all)."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How it is measured.

    Attributes:
        context: Tokens that the model was made to read; None where nothing says.
        sequence: Tokens that a window of a text reads; None for `DEFAULT_SEQUENCE`, or the context if that is less.
        stride: Tokens from one window to the next; None for the sequence's length.
        batch: Segments at once; None for as many as are worth while.
        limit: Windows of each text and questions of each task; None for all.

    Raises:
        EvaluationError: They contradict each other.
    """

    context: int | None = None
    sequence: int | None = None
    stride: int | None = None
    batch: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.context is not None and self.window > self.context:
            raise EvaluationError(
                f"sequence is {self.window}, the model's context has {self.context} tokens",
                hint="what a model says beyond its context is not to be trusted: measure shorter sequences",
            )
        if not 1 <= self.step <= self.window:
            raise EvaluationError(
                f"stride is {self.step}, expected 1 to the sequence's {self.window}",
                hint="a longer stride would leave tokens out",
            )

    @property
    def window(self) -> int:
        """Tokens that a window reads."""
        return min(DEFAULT_SEQUENCE, self.context or DEFAULT_SEQUENCE) if self.sequence is None else self.sequence

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.window if self.stride is None else self.stride


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be measured, in tokens."""

    settings: EvaluationSettings
    texts: tuple[EncodedText, ...]
    tasks: tuple[EncodedTask, ...]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in the order of the plan."""

    plan: EvaluationPlan
    perplexities: tuple[Perplexity, ...]
    tasks: tuple[TaskResult, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        settings = self.plan.settings
        texts = [
            {"text": text.name, "documents": text.documents, **_described(result)}
            for text, result in zip(self.plan.texts, self.perplexities, strict=True)
        ]
        tasks = [
            {"task": encoded.task.name, "file": encoded.task.file, **_described(result)}
            for encoded, result in zip(self.plan.tasks, self.tasks, strict=True)
        ]
        values = {**dataclasses.asdict(settings), "sequence": settings.window, "stride": settings.step}
        return {"settings": values, "texts": texts, "tasks": tasks}


def plan_evaluation(
    tokenizer: Tokenizer, texts: Sequence[Text], tasks: Sequence[Task], settings: EvaluationSettings
) -> EvaluationPlan:
    """Turns texts and tasks into tokens.

    Raises:
        EvaluationError: There is nothing to measure, or something that cannot be with these settings.
        TokenizerError: The tokenizer refuses.
    """
    if not texts and not tasks:
        raise EvaluationError("evaluation: nothing to measure", hint="give a text, a task, or both")
    return EvaluationPlan(
        settings,
        tuple(
            encode_text(tokenizer, text, sequence=settings.window, stride=settings.step, limit=settings.limit)
            for text in texts
        ),
        tuple(encode_task(tokenizer, task, context=settings.context, limit=settings.limit) for task in tasks),
    )


@contextlib.contextmanager
def _silent(_name: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda _done, _total: None


def evaluate(scorer: TokenScorer, plan: EvaluationPlan, stage: Stage = _silent) -> Evaluation:
    """Measures a model.

    Args:
        scorer: A runner's (`RunnerScorer`), a PyTorch model's (`TorchScorer`), or of whatever answers logits
            (`LogitsScorer`).
        plan: What to measure.
        stage: Shows progress.

    Raises:
        EvaluationError: A likelihood is no number.
        StepError: The model cannot run what is asked.
    """
    batch = plan.settings.batch
    perplexities, tasks = [], []
    for text in plan.texts:
        with stage(text.name) as progress:
            perplexities.append(measure_perplexity(scorer, text.windows, batch=batch, progress=progress))
    for encoded in plan.tasks:
        with stage(encoded.task.name) as progress:
            tasks.append(measure_task(scorer, encoded, batch=batch, progress=progress))
    return Evaluation(plan, tuple(perplexities), tuple(tasks))


def _described(result: Perplexity | TaskResult) -> dict[str, Any]:
    """A result's numbers, and what follows from them."""
    rates: Mapping[int, float] = result.active_rate
    mean = sum(rates.values()) / len(rates) if rates else None
    return {
        **dataclasses.asdict(result),
        "active_rate": {"layers": dict(rates), "routed": mean} if rates else None,
        "tokens_per_second": result.read_tokens / result.seconds,
    }
