"""Reads the documents to learn from: chats and texts in JSON lines, or plain text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.checkpoints.files.json_lines import line_value
from dlo_export.checkpoints.files.regular_file import check_regular_file
from dlo_export.checkpoints.files.text_files import files_below, read_text_file
from dlo_export.modeling.training.errors import TrainingDataError

ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".txt")
_LISTED_PROBLEMS = 5
_FORM = 'each line is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]} or {"text": "…"}'

Message = dict[str, str]


@dataclass(frozen=True)
class Record:
    """A document as it was found: a chat or a text.

    Attributes:
        origin: For errors: the file, and the line in it.
        messages: Of a chat, in order: dicts of `role` and `content`; empty for a text.
        text: Of a text; empty for a chat.
    """

    origin: str
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class DataFile:
    """A file of the data, as `training.json` lists it."""

    name: str
    sha256: str


def data_files(path: Path) -> list[Path]:
    """The .jsonl and .txt files of a folder in the order of their names, or the one file.

    Raises:
        TrainingDataError: There is none, or one cannot be read to its end.
    """
    files = files_below(path, _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise TrainingDataError(f"{path}: holds no .jsonl and no .txt file", hint=_FORM)
    for file in files:
        check_regular_file(file, TrainingDataError)
        if file.suffix.lower() not in _SUFFIXES:
            raise TrainingDataError(f"{file}: is neither .jsonl nor .txt", hint="name the file by what it holds")
    return files


def described_files(path: Path) -> list[DataFile]:
    """Names and hashes of `data_files`: what tells one set of data from another."""
    return [DataFile(file.name, file_sha256(file)) for file in data_files(path)]


def read_records(path: Path) -> list[Record]:
    """Reads all documents, in order.

    Raises:
        TrainingDataError: Names the first lines that are no chat and no text; or nothing is there.
    """
    records: list[Record] = []
    problems: list[str] = []
    for file in data_files(path):
        found = _text_record(file) if file.suffix.lower() == ".txt" else _line_records(file)
        before = len(records) + len(problems)
        for entry in found:
            if isinstance(entry, Record):
                records.append(entry)
            else:
                problems.append(entry)
        if len(records) + len(problems) == before:
            problems.append(f"{file}: is empty")
    if problems:
        listed = problems[:_LISTED_PROBLEMS]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise TrainingDataError("training data: " + "\n  ".join(listed), hint=_FORM)
    return records


def _text_record(file: Path) -> Iterator[Record | str]:
    try:
        text = read_text_file(file, TrainingDataError)
    except TrainingDataError as err:
        yield err.message
        return
    if text.strip():
        yield Record(str(file), text=text)


def _line_records(file: Path) -> Iterator[Record | str]:
    """Of each line a record, or what is wrong with it. Lines are bytes: a bad one does not spoil the others."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{file} line {number}"
            try:
                value = line_value(line)
            except (ValueError, RecursionError) as err:
                yield f"{origin}: is not JSON: {err}"
                continue
            yield _record(origin, value)


def _record(origin: str, value: Any) -> Record | str:
    if not isinstance(value, dict):
        return f"{origin}: is a JSON {type(value).__name__}, expected an object"
    if "messages" in value:
        problem = _chat_problem(value["messages"])
        if problem is not None:
            return f"{origin}: {problem}"
        messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in value["messages"])
        return Record(origin, messages=messages)
    if isinstance(value.get("text"), str):
        return Record(origin, text=value["text"]) if value["text"].strip() else f"{origin}: text is empty"
    return f"{origin}: has neither messages nor text, only {', '.join(sorted(map(str, value))) or 'nothing'}"


def _chat_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "messages is not a list of turns"
    for position, turn in enumerate(messages):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return f"messages[{position}] has no text in content"
        if turn.get("role") not in ROLES:
            return f"messages[{position}] has the role {turn.get('role')!r}, expected one of {', '.join(ROLES)}"
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        return "has no assistant turn, so nothing to learn"
    return None
