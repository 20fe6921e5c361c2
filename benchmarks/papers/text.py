"""The text of the experiments: what is trained on, and three domains of held-out text. Written once and kept.

Nothing is downloaded. Chats of docstrings and functions come from the standard library and from installed packages with
permissive licences, and so do the plain documents that are mixed among them. One package in eight, chosen by its name,
is never trained on, nor is the long description of every other one. Held-out text is

* ``reference``: Python's language reference (`pydoc_data`), prose;
* ``readme``: long descriptions of permissive packages, Markdown;
* ``code``: whole modules of the packages that are not trained on. A function that stands in them and, copied, in a
  package that is trained on is left out of the training text.

A second held-out set is a mix as the one that is learned, of other chats and documents: runs are watched on it, and
thresholds fitted to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.papers.documents import SHORTEST_DOCUMENT, Document, is_plain, modules, plain_documents
from benchmarks.papers.functions import FunctionChat, function_chats
from benchmarks.papers.sources import Unit, files_of, library_units, package_units, read_python, shown_name
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.whole_folder import whole_folder

TRAINING, HELD_OUT = "train.jsonl", "held-out.jsonl"
DOMAINS = ("reference", "readme", "code")
_CHARACTERS_PER_TOKEN = 5  # more than there are, so that there is text enough
_PLAIN = 0.3  # of the characters, before chats that are longer than a sequence are left out
_SPARE = 4  # times what is needed: windows are to come from many modules, and long chats will be left out
_FILES_AT_ONCE = 4_096
_SMALL_CORPUS = 20_000_000  # characters; starting processes takes longer than parsing so much


def domain_file(domain: str) -> str:
    """The file of a domain's documents, one a line: {"name", "text"}."""
    return f"{domain}.jsonl"


def prepare_text(folder: Path, *, training_tokens: int, held_out_tokens: int, packages: bool) -> None:
    """Extracts all text into a folder, whole or not at all; what is there stays.

    Args:
        folder: To make.
        training_tokens: About how many there should be to train on; all there are where that is less.
        held_out_tokens: The same of each held-out set.
        packages: Take installed packages besides the standard library.

    Raises:
        InputError: There is no text for one of the sets.
    """
    if folder.exists():
        return
    installed = package_units()
    units = library_units() + (installed if packages else [])
    held_out = [unit for unit in units if unit.held_out]
    # What is held out comes first: of the rest, only what does not stand in it is learned.
    spare = _SPARE * held_out_tokens * _CHARACTERS_PER_TOKEN
    files, asked = _module_files(held_out, spare), _enough(_distinct(held_out, set()), (1 - _PLAIN) * spare)
    descriptions = [(unit.name, unit.description) for unit in installed if unit.description_held_out]
    reference = _reference()
    beginnings = [(shown_name(file), text) for file, text in files.items()]
    # Of the whole files: a beginning can seldom be parsed.
    known = {chat.digest for file in files for chat in _file_chats(file)} | {chat.digest for chat in asked}
    characters = training_tokens * _CHARACTERS_PER_TOKEN
    watched, plain = _plain_documents(
        units if packages else [*units, *(dataclasses.replace(unit, files=()) for unit in installed)],
        [*reference, *descriptions, *beginnings],
        _PLAIN * spare,
        _PLAIN * characters,
    )
    chats = _distinct([unit for unit in units if not unit.held_out], known, characters)
    learned = _enough(chats, (1 - _PLAIN) * characters)
    sets: dict[str, list[dict[str, Any]]] = {
        TRAINING: _mixed(learned, plain),
        HELD_OUT: _mixed(asked, watched),
        domain_file("reference"): _as_lines(reference),
        domain_file("readme"): _as_lines(descriptions),
        domain_file("code"): _as_lines(beginnings),
    }
    with whole_folder(folder) as staging:
        for name, documents in sets.items():
            _save_lines(staging / name, documents)


def use_other_chats(folder: Path, data: Path) -> None:
    """Puts other chats in the place of those that were extracted: of fifty, one is held out.

    Args:
        folder: That `prepare_text` made.
        data: .jsonl as `dlo train` takes it.

    Raises:
        TrainingDataError: It holds something else, or too little.
    """
    from dlo_export.modeling.training.errors import TrainingDataError  # noqa: PLC0415 - these two load PyTorch
    from dlo_export.modeling.training.records import read_records  # noqa: PLC0415

    read_records(data)  # says what is wrong, line by line
    lines = [line for line in data.read_text(encoding="utf-8").splitlines(keepends=True) if line.strip()]
    held_out = [line for line in lines if int(hashlib.sha256(line.encode()).hexdigest(), 16) % 50 == 0]
    if not 0 < len(held_out) < len(lines):
        raise TrainingDataError(f"{data}: has {len(lines)} chats, too few to hold any out", hint="give hundreds")
    chosen = set(held_out)
    (folder / TRAINING).write_text("".join(line for line in lines if line not in chosen), encoding="utf-8")
    (folder / HELD_OUT).write_text("".join(held_out), encoding="utf-8")


def _plain_documents(
    units: Sequence[Unit], held_out: Sequence[Document], watched_characters: float, characters: float
) -> tuple[list[Document], list[Document]]:
    """Documents to watch runs on, and others to learn from."""
    found = plain_documents(units, (text for _, text in held_out), int(watched_characters + characters))
    watched: list[Document] = []
    while found and watched_characters > 0:
        watched.append(found.pop(0))
        watched_characters -= len(watched[-1][1])
    return watched, [document for document in found if document not in watched]  # some come several times


def _mixed(chats: Sequence[FunctionChat], documents: Sequence[Document]) -> list[dict[str, Any]]:
    """All of them, evenly: whoever takes the first ones takes as many of each."""
    lines = [*(chat.to_json() for chat in chats), *_as_lines(documents)]
    random.Random(0).shuffle(lines)
    return lines


def _as_lines(documents: Sequence[Document]) -> list[dict[str, Any]]:
    return [{"name": name, "text": text} for name, text in documents if len(text) >= SHORTEST_DOCUMENT]


def _save_lines(file: Path, documents: Sequence[dict[str, Any]]) -> None:
    if not documents:
        raise InputError(
            f"{file.name}: this machine has no such text", hint="install some packages with permissive licences"
        )
    file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


def _reference() -> list[Document]:
    from pydoc_data.topics import topics  # noqa: PLC0415 - a megabyte nobody else needs

    return [(name, topics[name]) for name in sorted(topics)]


def _module_files(units: Sequence[Unit], characters: int) -> dict[Path, str]:
    """Beginnings of modules by their files, of about so many characters in all."""
    found: dict[Path, str] = {}
    for file, text in modules(files_of(units)):
        found[file] = text
        characters -= len(text)
        if characters <= 0:
            break
    return found


def _enough(chats: Iterable[FunctionChat], characters: float) -> list[FunctionChat]:
    """The first chats that have so many characters, or all."""
    taken = []
    for chat in chats:
        taken.append(chat)
        characters -= len(chat.question) + len(chat.answer)
        if characters <= 0:
            break
    return taken


def _distinct(units: Sequence[Unit], known: set[str], characters: int = 0) -> Iterator[FunctionChat]:
    """Chats of units, each syntax once and none that is known.

    Args:
        units: Where to look.
        known: Digests to leave out.
        characters: About how many will be asked for.
    """
    seen = set(known)
    files = [file for file in files_of(units) if not is_plain(file)]
    for chats in _parsed(files, characters):
        for chat in chats:
            if chat.digest not in seen:
                seen.add(chat.digest)
                yield chat


def _parsed(files: Sequence[Path], characters: int) -> Iterator[list[FunctionChat]]:
    workers = len(os.sched_getaffinity(0))
    if workers < 4 or characters < _SMALL_CORPUS:
        yield from map(_file_chats, files)
        return
    # Not by fork: the parent may have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
        # In portions: whoever has enough stops asking, and nothing is parsed for nobody.
        for start in range(0, len(files), _FILES_AT_ONCE):
            yield from processes.map(_file_chats, files[start : start + _FILES_AT_ONCE], chunksize=32)


def _file_chats(file: Path) -> list[FunctionChat]:
    return list(function_chats(read_python(file)))
