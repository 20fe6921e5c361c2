"""Plain documents, learned beside chats: what routers learn from chats alone costs most on other kinds of text.

Long descriptions of packages, docstrings (one module's after the other) and modules: one of each kind in turn, as long
as there are any. Descriptions, which are few, come several times. What repeats held-out text is left out.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.papers.sources import Unit, files_of, name_digest, parsed_python, read_python, shown_name

LONGEST_MODULE, SHORTEST_DOCUMENT = 8_000, 1_000  # characters
_LONGEST_DESCRIPTION = 20_000
_SHORTEST_DOCSTRING = 120
_LONG_LINE = 60
_REPEATED = 0.1  # of a document's long lines; licences stand above many modules
_PLAIN_FILE_OF = 8
_DESCRIPTIONS_TIMES = 3

Document = tuple[str, str]
"""A name and a text."""


def is_plain(file: Path) -> bool:
    """Whether a file is learned as a plain document: chats are made of the others, so that nothing is learned twice."""
    return name_digest("/".join(file.parts[-2:])) % _PLAIN_FILE_OF == 0


def plain_documents(units: Sequence[Unit], held_out: Iterable[str], characters: int) -> list[Document]:
    """Documents to learn from.

    Args:
        units: All there are.
        held_out: Texts that none may repeat.
        characters: About how many they should have; all there are where that is less.
    """
    known = {line for text in held_out for line in _long_lines(text)}
    files = [file for file in files_of([unit for unit in units if not unit.held_out]) if is_plain(file)]
    named = ((shown_name(file), text) for file, text in modules(files[1::2]))
    kinds = (_descriptions(units), _docstrings(files[::2]), named)
    taken: list[Document] = []
    for document in itertools.chain.from_iterable(itertools.zip_longest(*kinds)):
        if characters <= 0:
            break
        if document is not None and not _repeats(document[1], known):
            taken.append(document)
            characters -= len(document[1])
    return taken


def _descriptions(units: Sequence[Unit]) -> Iterator[Document]:
    for unit in sorted(units, key=lambda unit: name_digest(unit.name)) * _DESCRIPTIONS_TIMES:
        if not unit.description_held_out and len(unit.description) >= SHORTEST_DOCUMENT:
            yield unit.name, unit.description[:_LONGEST_DESCRIPTION]


def _docstrings(files: Sequence[Path]) -> Iterator[Document]:
    for file in files:
        text = "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in docstrings(read_python(file)))
        if len(text) >= SHORTEST_DOCUMENT:
            yield shown_name(file), text[:LONGEST_MODULE]


def docstrings(source: str) -> Iterator[Document]:
    """What a module says about itself and what it defines; nothing where this Python cannot parse it."""
    if (module := parsed_python(source)) is None:
        return
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring) >= _SHORTEST_DOCSTRING:
                yield getattr(node, "name", ""), docstring


def modules(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Files and their beginnings, of those that are long enough."""
    for file in files:
        text = read_python(file)[:LONGEST_MODULE]
        if len(text) >= SHORTEST_DOCUMENT:
            yield file, text


def _repeats(text: str, known: set[str]) -> bool:
    lines = [*_long_lines(text)]
    return sum(line in known for line in lines) > _REPEATED * len(lines)


def _long_lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if len(line.strip()) >= _LONG_LINE)
