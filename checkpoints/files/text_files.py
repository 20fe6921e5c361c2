"""Text that people bring: plain files and files of lines, one by one or a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.regular_file import check_regular_file


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """What has one of these suffixes in a folder and all below it, sorted; links to folders are not followed.

    It may be a pipe, or a link to nothing: nothing that is called a text is left out in silence, its reader refuses it.
    """
    return sorted({file for suffix in suffixes for file in folder.rglob(f"*{suffix}") if not file.is_dir()})


def read_text_file(path: Path, error: type[InputError]) -> str:
    """The text of a file in UTF-8, without the byte order mark that some programs begin a file by.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        InputError: It is no text file.
    """
    check_regular_file(path, error)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise error(f"{path}: is not UTF-8 ({err})", hint="save it as UTF-8; is it a text?") from err
