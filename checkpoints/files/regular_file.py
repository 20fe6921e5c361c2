"""Files that can be read to their end: no pipe, which would be waited for, and no device, which has no end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


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
