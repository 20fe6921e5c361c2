"""What the documentation tells its reader to run: commands and Python, as they stand in its Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(file.relative_to(ROOT))
    for pattern in ("README.md", "docs/**/*.md", "plugins/**/*.md", "samples/**/*.md")
    for file in ROOT.glob(pattern)
)
# What a line or a piece of inline code begins with when it is a command.
PROGRAMS = (
    "dlo",
    "dlo-export",
    "accelerate",
    "python",
    "pip",
    "make",
    "cmake",
    "polygraphy",
    "build/dlo_generate",
    "build/cpp_onnxruntime/generate",
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One that a document shows.

    Attributes:
        document: Path of the document from the root.
        arguments: The program and its arguments.
        to_run: Whether it stands in a block of commands, to be run as it is; inline code may name a part of one.
    """

    document: str
    arguments: tuple[str, ...]
    to_run: bool

    def __str__(self) -> str:
        """Names a test."""
        return f"{self.document}: {shlex.join(self.arguments)}"

    @property
    def options(self) -> set[str]:
        """Long options, without their values."""
        return {argument.split("=")[0] for argument in self.arguments if argument.startswith("--")}


def text_of(document: str) -> str:
    """A document's Markdown."""
    return (ROOT / document).read_text()


def python_blocks(document: str) -> list[str]:
    """Of a document, in order."""
    return [body for language, body in _BLOCK.findall(text_of(document)) if language == "python"]


def inline_code(document: str) -> list[str]:
    """Pieces of inline code of a document, each on one line."""
    return [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", _BLOCK.sub("", text_of(document)))]


def commands(document: str) -> Iterator[Command]:
    """Of a document: those of its blocks in order, then those in its text."""
    blocks = [
        body.replace("\\\n", " ") for language, body in _BLOCK.findall(text_of(document)) if language in ("", "sh")
    ]
    lines = [line for body in blocks for line in body.splitlines()]
    for shown, to_run in ((lines, True), (inline_code(document), False)):
        for line in shown:
            for part in re.sub(r"[\[\]](?=[ -]|$)", "", line).split("&&"):
                if part.split()[:1] and part.split()[0] in PROGRAMS:
                    yield Command(document, tuple(shlex.split(part, comments=True)), to_run)
