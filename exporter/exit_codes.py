"""Which exit code an error ends the command with, and how it is shown."""

from __future__ import annotations

import errno
import sys

from dlo_export.checkpoints.errors import DloError

DONE, PARITY_FAILED, BAD_INPUT, BUILD_FAILED, MACHINE, OUR_BUG, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130

# What the `torch` extra installs; every command that needs it says so by failing to import it.
_EXTRA_PACKAGES = {"torch", "transformers", "jinja2", "accelerate"}


def exit_code(error: BaseException) -> int:
    """The code for an exception that reached the top.

    Errors of our own classes are the user's to mend; a ValueError of our own means bad input. Anything else
    that is not the machine's fault is a bug of ours.
    """
    declared = getattr(error, "exit_code", None)
    if isinstance(declared, int):
        return declared
    if isinstance(error, ValueError) and type(error).__module__.split(".")[0] == "dlo_export":
        return BAD_INPUT
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRA_PACKAGES:
        return MACHINE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return MACHINE
    return OUR_BUG


def report_error(error: BaseException | str) -> None:
    """Prints an error to stderr, without a traceback."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRA_PACKAGES:
        text = f"this command needs {error.name}, which is not installed\n\nhint: pip install 'dlo-export[torch]'"
    elif isinstance(error, BaseException) and exit_code(error) == OUR_BUG and not isinstance(error, DloError):
        text = (
            f"internal error: {type(error).__name__}: {error}"
            "\n\nhint: this is a bug of dlo-export; run again with -v for the traceback, and please report it"
        )
    elif isinstance(error, OSError):
        text = f"{error.filename or 'disk'}: {error.strerror}"
    print(f"error: {text}", file=sys.stderr)
