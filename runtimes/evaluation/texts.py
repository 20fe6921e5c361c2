"""Reads the texts that perplexity is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dlo_export.checkpoints.files.json_lines import SUFFIXES, is_json_lines, read_json_lines
from dlo_export.checkpoints.files.text_files import files_below, read_text_file
from dlo_export.runtimes.evaluation.errors import EvaluationError

_HINT = 'give a text file in UTF-8, a .jsonl file whose lines are {"text": "…"}, or a folder of .txt and .jsonl files'


@dataclass(frozen=True)
class Document:
    """A text that no other one continues.

    Attributes:
        origin: The file, and the line in it, for errors.
        text: Not empty.
    """

    origin: str
    text: str


@dataclass(frozen=True)
class Text:
    """Documents that are measured together.

    Attributes:
        name: As it was given.
        documents: At least one.
    """

    name: str
    documents: tuple[Document, ...]


def read_text(path: Path) -> Text:
    """Reads a file, or the .txt and .jsonl files of a folder and all below it in the order of their names.

    A .jsonl (or .jsonl.gz) file holds a document in each line, any other file is one document.

    Raises:
        EvaluationError: There is nothing, it cannot be read, or a document is empty.
    """
    if path.is_dir():
        files = files_below(path, (".txt", *SUFFIXES))
        if not files:
            raise EvaluationError(f"{path}: holds no .txt and no .jsonl file", hint=_HINT)
    else:
        files = [path]
    documents = [document for file in files for document in _documents(file)]
    if not documents:
        raise EvaluationError(f"{path}: is empty", hint=_HINT)
    return Text(str(path), tuple(documents))


def _documents(file: Path) -> list[Document]:
    if is_json_lines(file):
        return [_line(origin, values) for origin, values in read_json_lines(file, EvaluationError)]
    return [_document(str(file), read_text_file(file, EvaluationError))]


def _line(origin: str, values: dict[str, object]) -> Document:
    text = values.get("text")
    if not isinstance(text, str):
        raise EvaluationError(f"{origin}: has no text, only {', '.join(sorted(values)) or 'nothing'}", hint=_HINT)
    return _document(origin, text)


def _document(origin: str, text: str) -> Document:
    if not text.strip():
        raise EvaluationError(f"{origin}: is empty", hint="remove it: there is nothing to measure on")
    return Document(origin, text)
