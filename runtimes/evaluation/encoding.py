"""From texts and requests to the tokens that are scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dlo_export.runtimes.evaluation.errors import EvaluationError
from dlo_export.runtimes.evaluation.requests import Request, Task
from dlo_export.runtimes.evaluation.scorer import Segment
from dlo_export.runtimes.evaluation.texts import Document, Text
from dlo_export.runtimes.generation.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """A piece of a document.

    Attributes:
        segment: Its tokens.
        document: Number of the document.
        scored_bytes: Of the scored tokens' text, in UTF-8; None where nobody counted.
    """

    segment: Segment
    document: int
    scored_bytes: int | None = None


@dataclass(frozen=True)
class EncodedText:
    """A text as windows.

    Attributes:
        name: Of the text.
        documents: How many the windows are from.
        windows: At least one.
    """

    name: str
    documents: int
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class EncodedTask:
    """A task as segments.

    Attributes:
        task: What was encoded.
        segments: By question, of each choice.
        truncated: Requests whose context lost tokens at its beginning.
    """

    task: Task
    segments: tuple[tuple[Segment, ...], ...]
    truncated: int


def encode_text(tokenizer: Tokenizer, text: Text, *, sequence: int, stride: int, limit: int | None) -> EncodedText:
    """Cuts documents into windows.

    Every token but a document's first is scored exactly once; where the tokenizer puts a start token in front, that one
    is the first. A window reads at most `sequence` tokens and scores the last `stride` predictions, a document's first
    window all of them. The last window reaches back as far as it can.

    Args:
        tokenizer: Of the model.
        text: The documents.
        sequence: Tokens that a window reads.
        stride: Tokens from one window to the next.
        limit: Windows to measure; None for all.

    Raises:
        EvaluationError: A document has no token to predict.
        TokenizerError: The tokenizer does not tell where in a text its tokens are.
    """
    windows: list[Window] = []
    for number, document in enumerate(text.documents):
        if limit is not None and len(windows) >= limit:
            break
        windows += _windows(tokenizer, document, number, sequence, stride)
    windows = windows[:limit]
    return EncodedText(text.name, len({window.document for window in windows}), tuple(windows))


def encode_task(tokenizer: Tokenizer, task: Task, *, context: int | None, limit: int | None) -> EncodedTask:
    """Turns contexts and continuations into tokens, as language-model evaluations do.

    Spaces at a context's end go to the continuation, both are encoded as one text, and it is cut where the context's
    own tokens end. What is longer than the model's context loses its beginning.

    Args:
        tokenizer: Of the model.
        task: The questions.
        context: Tokens that the model reads at most; None for any number.
        limit: Questions to measure; None for all.

    Raises:
        EvaluationError: A continuation has no tokens of its own, or more than the model reads.
    """
    questions, truncated = [], 0
    for question in task.questions[:limit]:
        segments = []
        encode = functools.cache(tokenizer.encode)  # a question's choices mostly have one context
        for request in question.requests:
            ids, start = _pair(tokenizer, encode, request)
            excess = 0 if context is None else len(ids) - 1 - context
            if excess >= start:
                raise EvaluationError(
                    f"{request.origin}: the continuation has {len(ids) - start} tokens, the model reads {context}",
                    hint="leave the request out, or take a model of a longer context",
                )
            if excess > 0:
                truncated += 1
                ids, start = ids[excess:], start - excess
            segments.append(Segment(np.array(ids, np.int64), start))
        questions.append(tuple(segments))
    return EncodedTask(task, tuple(questions), truncated)


def _windows(tokenizer: Tokenizer, document: Document, number: int, sequence: int, stride: int) -> Iterator[Window]:
    ids, ends = tokenizer.encode_with_ends(document.text)
    if len(ids) < 2:
        raise EvaluationError(
            f"{document.origin}: has {len(ids)} tokens, so none that others foretell",
            hint="remove it, or put it into one document with others",
        )
    tokens = np.array(ids, np.int64)
    first = 1
    while first < len(ids):
        last = min(first + (sequence if first == 1 else stride), len(ids))
        begin = max(0, last - 1 - sequence)
        scored = document.text[ends[first - 1] : ends[last - 1]]
        yield Window(Segment(tokens[begin:last], first - begin), number, len(scored.encode()))
        first = last


def _pair(tokenizer: Tokenizer, encode: Callable[[str], list[int]], request: Request) -> tuple[list[int], int]:
    """Tokens of context and continuation, and where the continuation's begin."""
    context = request.context.rstrip()
    if context:
        ids, start = encode(request.context + request.continuation), len(encode(context))
    else:
        ids, start = encode(request.context + request.continuation), 1
        if ids[:1] != [tokenizer.start_token]:
            if tokenizer.start_token is None:
                raise EvaluationError(
                    f"{request.origin}: has no context, and the tokenizer no token that a text begins or ends with",
                    hint="give the request a context",
                )
            ids = [tokenizer.start_token, *ids]
    if start >= len(ids):
        raise EvaluationError(
            f"{request.origin}: continuation {request.continuation!r} has no tokens behind those of the context",
            hint="begin the continuation where a word begins, with the space before it",
        )
    return ids, start
