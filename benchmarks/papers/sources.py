"""Python files on this machine whose licences allow training on them: the standard library and permissive packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|0BSD|Zlib|Unlicense)\b", re.IGNORECASE)
_OTHER = re.compile(r"GPL|MPL|Mozilla|proprietary|LicenseRef|NVIDIA|commercial", re.IGNORECASE)
_LONGEST_LICENCE = 200  # some distributions put the licence's whole text where its name belongs
_LARGEST_FILE = 300_000
_HELD_OUT_OF = 8
_OWN = "dlo-export"  # left out: its text changes with every commit


@dataclass(frozen=True)
class Unit:
    """What is trained on or held out as a whole, because code is copied within it: a package, a module of the library.

    Attributes:
        name: Of a distribution, or ``python/`` and a module of the standard library.
        files: Its Python files.
        description: A distribution's own long description; empty for the standard library.
    """

    name: str
    files: tuple[Path, ...]
    description: str = ""

    @property
    def held_out(self) -> bool:
        """Whether it is measured on and never trained on; decided by the name alone, the same on every machine."""
        return name_digest(self.name) % _HELD_OUT_OF == 0

    @property
    def description_held_out(self) -> bool:
        """The same of its description: every other one, since there are few."""
        return self.held_out or name_digest(f"description of {self.name}") % 2 == 0


def library_units() -> list[Unit]:
    """The modules and packages of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    units = []
    for path in sorted(root.iterdir()):
        if path.suffix == ".py":
            files = [path]
        elif (path / "__init__.py").is_file() and path.name not in ("test", "idlelib", "pydoc_data", "lib2to3"):
            files = [file for file in path.rglob("*.py") if "test" not in file.parent.name]
        else:
            continue
        units.append(Unit(f"python/{path.stem}", tuple(files)))
    return units


def package_units() -> list[Unit]:
    """The installed distributions whose metadata name permissive licences and no other."""
    units = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name = metadata["Name"]
        if name in (None, _OWN) or not is_permissive(_licence(metadata)):
            continue
        listed = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
        files = [file for file in listed if file.suffix == ".py" and "test" not in str(file.parent).lower()]
        units[name.lower()] = Unit(name.lower(), tuple(files), str(metadata.json.get("description", "")))
    return [units[name] for name in sorted(units)]


def is_permissive(licence: str) -> bool:
    """Whether a licence's name is that of a permissive one, and nothing in it hints at another."""
    return bool(_PERMISSIVE.search(licence)) and not _OTHER.search(licence)


def _licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """All that the metadata say about the licence, in one line."""
    classifiers = [line for line in metadata.get_all("Classifier") or () if line.startswith("License")]
    stated = [metadata[key] for key in ("License-Expression", "License") if metadata[key]]
    return "; ".join([*classifiers, *(text[:_LONGEST_LICENCE] for text in stated)])


def files_of(units: Sequence[Unit]) -> list[Path]:
    """The files of units, mixed, in an order that only their names decide."""
    files = [file for unit in units for file in unit.files]
    return sorted(files, key=lambda file: name_digest(shown_name(file)))


def read_python(file: Path) -> str:
    """A file's text; nothing where it is large, not UTF-8 or no longer there: a corpus can do without it."""
    try:
        return file.read_text(encoding="utf-8") if file.stat().st_size <= _LARGEST_FILE else ""
    except (OSError, UnicodeDecodeError):
        return ""


def parsed_python(source: str) -> ast.Module | None:
    """A module's syntax; None where this Python cannot parse it: a corpus holds files for other versions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's escapes and comparisons
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def shown_name(file: Path) -> str:
    """The end of a file's path, which is the same on every machine."""
    return "/".join(file.parts[-3:])


def name_digest(name: str) -> int:
    """A number that depends on the name alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
