"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.exchange import exchange
from dlo_export.checkpoints.files.folder_kind import folder_kind
from dlo_export.checkpoints.files.folder_lock import FolderLock
from dlo_export.checkpoints.files.leftovers import PARTIAL, REPLACED, remove_leftover
from dlo_export.checkpoints.files.output_check import FolderExistsError, check_output_folder, check_replaceable
from dlo_export.checkpoints.files.uninterrupted import uninterrupted
from dlo_export.checkpoints.files.written_files import list_files, mark_unfinished, remove_written_files

__all__ = ["FolderExistsError", "keep_aside", "whole_folder"]

_MOST_KEPT = 999  # as many digits as names leave room for


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling to write into, which becomes `folder` when the block ends without an exception.

    Whatever happens, also a signal or a kill at any moment, `folder` is as it was before or whole and new. What a kill
    leaves beside it, the next call removes.

    Args:
        folder: Where the result appears. Its parents are made.
        overwrite: Replace a folder of the same kind (see `FolderKind`) that this program wrote; it stays untouched
            until the new one is complete.

    Raises:
        FolderExistsError: The folder holds something, now or at the end, and `overwrite` is not set, it is not only
            this program's, or it is of another kind.
        InputError: The folder cannot be made of that name.
        MachineError: The system refuses; nothing has changed, unless the message says so.
    """
    folder = Path(folder)
    check_output_folder(folder, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        with uninterrupted(), _reported(folder):
            stack.callback(_remove_empty, _make_parents(folder.parent))
            staging, lock = _new_staging(folder)
            stack.callback(lock.release)
            stack.callback(_discard, staging)
        try:
            yield staging
            with uninterrupted(), _reported(folder):
                list_files(staging)
                _put(staging, folder, overwrite=overwrite)
        except (OSError, MachineError) as err:
            if lock.holds(staging) or lock.holds(folder):
                raise
            raise MachineError(
                f"{folder}: {staging.name}, in which it was being written, was moved or removed by somebody",
                hint="run again, and leave that folder alone until the command has ended",
            ) from err


def keep_aside(staging: Path, wanted: Path, inputs: Iterable[Path | None] = ()) -> Path:
    """Makes a folder that `whole_folder` yielded into one of its own: what was made is wrong, but worth looking at.

    The block must end by an exception then: there is nothing left to put into place.

    Args:
        staging: What was yielded.
        wanted: Where it goes. What this program kept aside there is replaced; where anything else lies, a number is
            added.
        inputs: Never replaced either.

    Returns:
        Where it went.

    Raises:
        InputError: It can go nowhere there: the reason of the last place that was tried.
    """
    with uninterrupted(), _reported(wanted):
        list_files(staging)
        for number in range(1, _MOST_KEPT + 1):
            kept = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                check_output_folder(kept, overwrite=True, makes=folder_kind(staging), inputs=inputs, growth=0)
                _put(staging, kept, overwrite=True)
            except InputError:
                if number == _MOST_KEPT:
                    raise
            else:
                return kept
    raise AssertionError("the last place was taken or refused")


def _new_staging(folder: Path) -> tuple[Path, FolderLock]:
    """Makes a marked folder that is held for as long as this process lives."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
        try:
            lock = FolderLock(staging, wait=True)
        except FileNotFoundError:
            # Another command that finds the folder before it is held takes it for a dead one's, and removes it.
            continue
        except BaseException:
            _discard(staging)
            raise
        try:
            if lock.holds(staging):
                mark_unfinished(staging)
                # mkdtemp makes private folders; what is shared is decided by the user's umask, as for any other one. It
                # may take nothing from ourselves: the folder could not even be removed again.
                staging.chmod(0o777 & ~_umask() | 0o700)
                return staging, lock
        except BaseException:
            _discard(staging)
            lock.release()
            raise
        lock.release()


def _put(staging: Path, folder: Path, *, overwrite: bool) -> None:
    """Puts the complete folder into place."""
    # Renaming never replaces anything but an empty folder: what appeared here meanwhile is not lost.
    try:
        staging.rename(folder)
    except OSError as err:
        if err.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    else:
        return
    check_replaceable(folder, overwrite=overwrite, makes=folder_kind(staging))
    try:
        lock = FolderLock(folder)
    except BlockingIOError as err:
        raise FolderExistsError(
            f"output {folder}: another command is replacing it", hint="run them one after the other"
        ) from err
    try:
        _replace(staging, folder)
    except OSError as err:
        if err.errno != errno.EXDEV:
            raise
        raise FolderExistsError(
            f"{folder}: cannot be moved: it lies in a lower layer of an overlay file system, as a container's image is",
            hint="remove it yourself, or give another folder; nothing has changed",
        ) from err
    finally:
        lock.release()


def _replace(staging: Path, folder: Path) -> None:
    # Only here can a power failure cost something: the old folder goes, so the new one must be on the disk by then.
    _sync(staging)
    replaced = staging
    if not exchange(staging, folder):
        replaced = staging.with_suffix(REPLACED)
        folder.rename(replaced)
        try:
            staging.rename(folder)
        except BaseException:
            replaced.rename(folder)
            raise
    try:
        _sync_folder(folder.parent)
        remove_written_files(replaced)
    except OSError as err:
        raise MachineError(
            f"{folder}: is written, but what it replaces cannot be removed: {err.strerror}",
            hint=f"the next command that writes here tries again; it lies in {replaced}",
        ) from err


def _discard(staging: Path) -> None:
    """Removes what is left of a folder under way."""
    try:
        _try_to_remove(staging)
    except KeyboardInterrupt:  # in the moment before signals are held back
        _try_to_remove(staging)
        raise


def _try_to_remove(staging: Path) -> None:
    # Where this fails, too, the error under way says more; the next command that writes here tries again.
    with uninterrupted(), contextlib.suppress(OSError):
        if staging.exists():
            remove_leftover(staging)


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder and what it lies in; returns what was not there before, the innermost first."""
    missing = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        missing.append(parent)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # the result lies in it, or another command's
            return


def _sync(folder: Path) -> None:
    """Has the disk hold a folder's files and their names."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno != errno.EINVAL:  # file systems that cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Says which folder the system's refusal is about."""
    try:
        yield
    except OSError as err:
        raise MachineError(
            f"{folder}: cannot be written: {err.strerror}",
            hint="mend that, or give another folder; nothing has changed",
        ) from err


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
