"""A mapped file that is cut short, or whose disk fails, while it is read: the system says so by a signal."""

from __future__ import annotations

import ctypes
import os
import signal

from dlo_export.exporter.exit_codes import FILE_CUT_SHORT, MACHINE

_MESSAGE = f"error: {FILE_CUT_SHORT}\n".encode()


def report_bus_errors() -> None:
    """Ends the command with a message where the system would end it with none (POSIX, SIGBUS)."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _HANDLER_TYPE), ctypes.c_void_p
    libc.signal(signal.SIGBUS, _end)


def _end_with_message(number: int) -> None:
    # The instruction that failed would fail again and again: nothing but an end is possible, at once.
    try:
        os.write(2, _MESSAGE)
    finally:
        os._exit(MACHINE)


# Python's own handlers run after the instruction, which here never ends; this one runs in its place.
_HANDLER_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int)
_end = _HANDLER_TYPE(_end_with_message)  # kept for as long as the system may call it
