"""Chats made of code: a function's signature and docstring are the question, its source is the answer."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.papers.sources import parsed_python

_SHORTEST_DOCSTRING, _LONGEST_DOCSTRING = 40, 2_000
_LEAST_LINES, _MOST_LINES = 3, 80


@dataclass(frozen=True)
class FunctionChat:
    """A function as a chat.

    Attributes:
        digest: Of its syntax, without the docstring: the same for copies that differ in layout and comments only.
        question: What the user asks.
        answer: The source without the docstring.
    """

    digest: str
    question: str
    answer: str

    def to_json(self) -> dict[str, Any]:
        """A line of training data."""
        turns = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return {"messages": turns}


def function_chats(source: str) -> Iterator[FunctionChat]:
    """The functions and methods of a module that have a docstring and a body worth asking for, in order.

    A file that this Python cannot parse has none.
    """
    if (module := parsed_python(source)) is None:
        return
    lines = source.splitlines()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (chat := _chat(node, lines)) is not None:
            yield chat


def _chat(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> FunctionChat | None:
    docstring = ast.get_docstring(node)
    if docstring is None or not _SHORTEST_DOCSTRING <= len(docstring) <= _LONGEST_DOCSTRING or not docstring.isascii():
        return None
    first, *body = node.body
    end = first.end_lineno or first.lineno
    # The docstring has its lines to itself, so that the source without it is the source without these lines.
    if not body or first.lineno == node.lineno or body[0].lineno <= end:
        return None
    kept = lines[node.lineno - 1 : first.lineno - 1] + lines[end : node.end_lineno]
    answer = textwrap.dedent("\n".join(kept)).strip()
    if not (_LEAST_LINES <= len(kept) <= _MOST_LINES and answer.isascii()):
        return None
    kind = "async function" if isinstance(node, ast.AsyncFunctionDef) else "function"
    question = f"Write the Python {kind} {node.name}({ast.unparse(node.args)}).\n\n{docstring}"
    digest = hashlib.sha256("\n".join(ast.dump(statement) for statement in body).encode()).hexdigest()
    return FunctionChat(digest, question, answer)
