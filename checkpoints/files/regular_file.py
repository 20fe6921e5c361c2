"""Files that can be read to their end: no pipe, which would be waited for, and no device, which has no end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from dlo_export.checkpoints.errors import InputError

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR)
_SOMETHING_ELSE = (*_NOTHING_THERE, errno.ELOOP, errno.EINVAL)  # a link to nothing, to itself, or no file at all


def regular_size(path: Path) -> int:
    """Bytes of a regular file, or of the one a link leads to.

    Raises:
        OSError: There is nothing of this name, or it is something else.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Is no regular file", str(path))
    return status.st_size


def check_regular_file(path: Path, error: type[InputError]) -> None:
    """Refuses a file that a user named, or that lies in a folder the user named, in the user's words.

    Args:
        path: Of a file or a link to one.
        error: What to raise.

    Raises:
        InputError: There is nothing of this name, or something else.
        OSError: The system does not say what it is.
    """
    try:
        regular_size(path)
    except IsADirectoryError as err:
        raise error(f"{path}: is a folder, expected a file", hint="name the file in it") from err
    except OSError as err:
        if err.errno in _NOTHING_THERE and not path.is_symlink():
            raise error(f"{path}: no such file or folder", hint="is the name right?") from err
        if err.errno in _SOMETHING_ELSE:
            raise error(f"{path}: is no regular file", hint="remove it, or replace the link by the file") from err
        raise
