"""Messages that fit on a screen and cannot steer the terminal they are shown on."""

from __future__ import annotations

import re
import unicodedata

_COLUMNS = 80
_LINE_CHARACTERS, _HINT_CHARACTERS = 8 * _COLUMNS, 4 * _COLUMNS  # of one line, shown as eight or four
_ROWS = 16  # of a message, its hint apart
_HINT = "\n\nhint: "
# Controls, formats (which reorder text), private characters, lone surrogates.
_UNPRINTABLE = {"Cc", "Cf", "Co", "Cs"}
# Names in quotes or not, numbers, words: a value longer than this is no word.
_LONG_WORD = re.compile(r"\S{241,}")


def printable(text: str) -> str:
    """A message as it may be shown: control characters escaped, long values and long lists cut with a count.

    Args:
        text: The message, its hint behind an empty line.
    """
    body, separator, hint = text.rpartition(_HINT)
    if not separator:
        body, hint = hint, ""
    lines, kept, rows = body.split("\n"), [], 0
    for number, line in enumerate(lines):
        shown = _shortened(escaped(line), _LINE_CHARACTERS)
        rows += _rows(shown)
        if rows > _ROWS and number:
            kept.append(f"  … and {len(lines) - number} more lines")
            break
        kept.append(shown)
    return "\n".join(kept) + (f"{_HINT}{_shortened(escaped(hint), _HINT_CHARACTERS)}" if hint else "")


def escaped(line: str) -> str:
    """A line of text with what could steer a terminal, or hide what it says, written as escapes."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNPRINTABLE else character
        for character in line
    )


def _rows(line: str) -> int:
    return max(1, -(-len(line) // _COLUMNS))


def _shortened(line: str, most: int) -> str:
    line = _LONG_WORD.sub(lambda word: _cut(word[0], 160), line)
    return _cut(line, most)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    # What stands at the end, a file's name or what was expected, tells as much as the beginning.
    end = length // 4
    start = length - end - 40
    return f"{text[:start]}… ({len(text) - start - end} characters) …{text[-end:]}"
