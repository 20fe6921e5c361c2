"""Whether a folder may be written, found out before the work is done."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.files.folder_kind import FolderKind, folder_kind
from dlo_export.checkpoints.files.leftovers import NAME_GROWTH, is_name_under_way, remove_leftovers
from dlo_export.checkpoints.files.written_files import is_ours, unfamiliar_files

_NAMED_FILES = 5
_OCTAL = re.compile(rb"\\([0-7]{3})")  # how spaces and the like are written there
# Room that a name must leave: while the folder is written, or where a failed one is kept aside beside it.
_KEPT_GROWTH = len(".failed-999")


class FolderExistsError(InputError):
    """The folder to write exists, and must not, need not or cannot be replaced."""


def check_output_folder(
    folder: Path,
    *,
    overwrite: bool = False,
    makes: FolderKind | None = None,
    inputs: Iterable[Path | None] = (),
    growth: int = NAME_GROWTH + _KEPT_GROWTH,
) -> None:
    """Refuses an output that cannot be written or must not be replaced; removes what killed commands left beside it.

    Args:
        folder: The folder to make.
        overwrite: Whether it may be replaced, if this program wrote it and nothing else lies in it.
        makes: What will be in it, which decides what it may replace; None where that is not known yet.
        inputs: Files and folders the command reads; those that are None or not there do not matter.
        growth: Bytes that names made of the folder's are longer.

    Raises:
        FolderExistsError: The folder is not empty, and not to be replaced, not only this program's, of another kind, or
            nothing can be removed from it.
        InputError: It is a file, a link, an input, holds one, or cannot be made of such a name.
        MachineError: Its place cannot be written to.
    """
    if folder.name in ("", ".."):
        raise InputError(f"output {folder}: is no name of a folder to make", hint="give the new folder a name: -o NAME")
    _check_unicode(folder)
    if is_name_under_way(folder.name):
        raise InputError(
            f"output {folder}: is called like what a killed command leaves, which the next one removes",
            hint="choose another name",
        )
    try:
        _check_place(folder, growth)
        # What cannot even be looked at is not there either: whoever opens it says so.
        read = [path for path in inputs if path is not None and os.path.exists(path)]
        remove_leftovers(folder.parent, read)
        if os.path.lexists(folder):
            _check_not_in_use(folder, read)
            _check_no_mount_point(folder)
            check_replaceable(folder, overwrite=overwrite, makes=makes)
    except (OSError, ValueError) as err:  # too long a path, a null byte, too many links
        if isinstance(err, InputError):
            raise
        reason = err.strerror if isinstance(err, OSError) else err
        raise InputError(f"output {folder}: {reason}", hint="choose another name") from err


def check_output_space(folder: Path, needed: int) -> None:
    """Refuses to start what the disk of the folder to make cannot hold.

    Args:
        folder: To be made, see `check_output_folder`.
        needed: Bytes.

    Raises:
        MachineError: There is less room.
    """
    check_disk_space(_existing_place(folder), needed, folder, "the weights need")


def check_replaceable(folder: Path, *, overwrite: bool, makes: FolderKind | None) -> None:
    """Refuses a folder that holds something, unless it may be replaced and holds only what this program wrote.

    Args:
        folder: Which is there.
        overwrite: Whether it may be replaced.
        makes: By what; None where that is not known yet.

    Raises:
        FolderExistsError: So.
    """
    if folder.is_symlink():
        raise FolderExistsError(
            f"output {folder}: is a link to {os.readlink(folder)}, expected a folder or nothing",
            hint="give the folder itself, or another name",
        )
    if not folder.is_dir():
        raise FolderExistsError(f"output {folder}: is a file, expected a folder or nothing", hint="choose another name")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FolderExistsError(
            f"output {folder}: the folder is not empty", hint="choose another, or replace it with --force"
        )
    if unfamiliar := unfamiliar_files(folder):
        listed = ", ".join(unfamiliar[:_NAMED_FILES])
        more = f" and {len(unfamiliar) - _NAMED_FILES} more" if len(unfamiliar) > _NAMED_FILES else ""
        whose = "holds files that are not dlo-export's" if is_ours(folder) else "is not a folder that dlo-export wrote"
        raise FolderExistsError(
            f"output {folder}: {whose}, so --force does not replace it: {listed}{more}",
            hint="choose another name, or move these files away yourself",
        )
    found = folder_kind(folder)
    if makes is not None and not makes.may_replace(found):
        raise FolderExistsError(
            f"output {folder}: is {found}, which --force does not replace with {makes}",
            hint="choose another name, or move it away yourself",
        )
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        if not os.access(place, os.W_OK | os.X_OK):
            raise FolderExistsError(
                f"output {folder}: nothing can be removed from {place}",
                hint="mend its permissions, or choose another name",
            )


def _check_unicode(folder: Path) -> None:
    # A model may lie in such a place; what is written there could not be opened: ONNX Runtime and the tokenizers
    # package take paths as UTF-8.
    try:
        str(folder.absolute()).encode("utf-8")
    except UnicodeEncodeError as err:
        raise InputError(
            f"output {folder}: its path is not UTF-8, ONNX Runtime could open nothing in it",
            hint="give another folder with -o",
        ) from err


def _check_place(folder: Path, growth: int) -> None:
    place = _existing_place(folder)
    if place.is_symlink() and not place.exists():
        raise InputError(f"output {folder}: {place} is a link to nothing", hint="mend the link, or give another folder")
    if not place.is_dir():
        raise InputError(f"output {folder}: {place} is a file, expected a folder", hint="give another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise MachineError(
            f"output {folder}: {place} cannot be written to", hint="mend its permissions, or give another folder"
        )
    room = os.pathconf(place, "PC_NAME_MAX") - growth
    if len(os.fsencode(folder.name)) > room:
        raise InputError(
            f"output {folder.name[:40]}…: the name has {len(os.fsencode(folder.name))} bytes, at most {room} fit here",
            hint="choose a shorter name",
        )
    with contextlib.suppress(FileNotFoundError):
        os.lstat(folder.with_name(folder.name + "x" * growth))  # a path too long says so


def _existing_place(folder: Path) -> Path:
    """The innermost of a folder's parents that is there."""
    return next(parent for parent in folder.absolute().parents if os.path.lexists(parent))


def _check_not_in_use(folder: Path, inputs: list[Path]) -> None:
    if not folder.exists():
        return
    for path in inputs:
        for read in _files_read(path):
            if any(os.path.samefile(folder, place) for place in (read, *read.parents)):
                what = "is" if os.path.samefile(folder, path) else "holds"
                raise InputError(f"output {folder}: {what} the input {path}", hint="choose another name")
    here = Path.cwd()
    if any(os.path.samefile(folder, place) for place in (here, *here.parents)):
        raise InputError(f"output {folder}: is or holds the current folder", hint="choose another name")


def _check_no_mount_point(folder: Path) -> None:
    # A container's volume: the new folder could not take its place.
    if os.path.ismount(folder) or Path(os.path.realpath(folder)) in _mount_points():
        raise InputError(
            f"output {folder}: is a mount point, which no folder can replace",
            hint=f"give a folder in it: -o {folder / 'model'}",
        )


def _mount_points() -> set[Path]:
    """Of Linux, proc_pid_mountinfo(5): of folders of the same file system too, which `os.path.ismount` overlooks."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except FileNotFoundError:
        return set()
    return {Path(os.fsdecode(_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]))) for line in lines}


def _files_read(path: Path) -> Iterator[Path]:
    """An input's place, and the places its links lead to: weights often lie elsewhere."""
    yield path.resolve()
    if path.is_dir():
        yield from (entry.resolve() for entry in path.iterdir() if entry.is_symlink() and entry.exists())
