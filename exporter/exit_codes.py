"""Which exit code an error ends the command with, and how it is shown."""

from __future__ import annotations

import errno
import re
import sys

from dlo_export.checkpoints.errors import DloError
from dlo_export.exporter.messages import printable

DONE, PARITY_FAILED, BAD_INPUT, BUILD_FAILED, MACHINE, OUR_BUG = 0, 1, 2, 3, 4, 70
INTERRUPTED, OUTPUT_LOST, TERMINATED = 130, 141, 143

# What extras install, and which; every command that needs one says so by failing to import it.
_EXTRA_PACKAGES = {**dict.fromkeys(("torch", "transformers", "jinja2", "accelerate"), "torch"), "peft": "train"}
# PyTorch's words for a machine that has no room or whose GPU failed, by module and name, or by what an error that is
# called nothing in particular says: PyTorch itself is not imported for it.
_TORCH_ERRORS = {("torch", "OutOfMemoryError"), ("torch", "AcceleratorError")}
_TORCH_SAYS = re.compile(
    r"DefaultCPUAllocator: .*|(CUBLAS|CUDNN|CUSOLVER|CUFFT)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|ARCH_MISMATCH)|"
    r"CUDA (error|driver): .*|NCCL error.*|Found no NVIDIA driver.*|The NVIDIA driver on your system is too old.*"
)
# What the system refuses for reasons of its own: room, rights, limits, devices.
_MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ETXTBSY),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN),
    errno.EFAULT,  # what a write says where reading the bytes from a mapped file would be a bus error
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT),
}
# What no file can be called, wherever the name was given.
_NAME_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP}
FILE_CUT_SHORT = (
    "a file that is being read has become shorter, or its disk cannot be read"
    "\n\nhint: let nobody write to the model while it is read; what is half-written the next command removes"
)
_GENERAL_HINTS = {
    BAD_INPUT: "mend what is named above; `dlo COMMAND --help` says what is expected",
    BUILD_FAILED: "run again with -v for the time and the messages of each stage",
    MACHINE: "mend that and run again",
}


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
    if isinstance(error, OSError) and error.errno in _NAME_ERRORS:
        return BAD_INPUT
    if (
        _torch_fault(error) is not None
        or isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in _MACHINE_ERRORS)
    ):
        return MACHINE
    return OUR_BUG


def _torch_fault(error: BaseException) -> str | None:
    """What PyTorch says of the machine, in a line; None where an error is none of it."""
    if (type(error).__module__, type(error).__name__) in _TORCH_ERRORS:
        return (str(error).splitlines() or [type(error).__name__])[0]
    found = _TORCH_SAYS.search(str(error)) if type(error) is RuntimeError else None
    return None if found is None else found[0]


def report_error(error: BaseException | str) -> None:
    """Prints an error to stderr, without a traceback, on one screen at most."""
    print(f"error: {printable(_text(error))}", file=sys.stderr)


def _text(error: BaseException | str) -> str:
    if isinstance(error, str):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRA_PACKAGES:
        extra = _EXTRA_PACKAGES[error.name]
        return f"this command needs {error.name}, which is not installed\n\nhint: pip install 'dlo-export[{extra}]'"
    code = exit_code(error)
    if code == OUR_BUG and not isinstance(error, DloError):
        return (
            f"internal error: {type(error).__name__}: {error}"
            "\n\nhint: this is a bug of dlo-export; run again with -v for the traceback, and please report it"
        )
    if isinstance(error, OSError) and error.errno == errno.EFAULT:
        return FILE_CUT_SHORT
    if isinstance(error, OSError):
        text = f"{error.filename or 'disk'}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = "memory is exhausted"
    elif (fault := _torch_fault(error)) is not None:
        text = f"{fault}\n\nhint: take a smaller batch, a machine or GPU with more memory, or --device cpu"
    elif usage := getattr(error, "format_message", None):  # typer's own errors, which name the option
        context = getattr(error, "ctx", None)
        command = "dlo" if context is None else context.command_path
        return f"{usage()}\n\nhint: `{command} --help` lists the options"
    else:
        text = str(error)
    general = _GENERAL_HINTS.get(code)
    return text if general is None or "hint:" in text else f"{text}\n\nhint: {general}"
