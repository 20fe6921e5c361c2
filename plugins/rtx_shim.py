"""Makes `libtensorrt_rtx.so` resolve to the library the tensorrt_rtx wheel has already loaded.

When TensorRT-RTX's ONNX parser meets a plugin node it dlopens "libtensorrt_rtx.so", a name its wheel does not ship
(only "libtensorrt_rtx.so.1"), and the process dies by SIGABRT (tensorrt-rtx 1.7.1.116). The dynamic loader answers a
dlopen by any loaded object's soname, so a shared object with that soname and one dependency, the wheel's real library,
is enough. It holds no code: it is written here byte by byte, which needs no compiler, no write access to the wheel and
no LD_LIBRARY_PATH before the process starts.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
import tempfile
from pathlib import Path
from typing import Final

from dlo_export.plugins.errors import PluginError

UNVERSIONED: Final = "libtensorrt_rtx.so"
VERSIONED: Final = "libtensorrt_rtx.so.1"
_RTLD_NOLOAD: Final = 4  # Linux's value; ctypes does not name it
_MACHINES = {"x86_64": 62, "aarch64": 183}
_PAGE = 0x10000  # the largest page size of the two machines, so that one layout serves both
_HEADER_BYTES, _PROGRAM_HEADER_BYTES, _SYMBOL_BYTES = 64, 56, 24
_PT_LOAD, _PT_DYNAMIC, _PF_READ_WRITE = 1, 2, 6
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14

_loaded: ctypes.CDLL | None = None


def provide_unversioned_library() -> None:
    """Loads the stub, once per process; call it after `import tensorrt_rtx` and before a parser sees a plugin node.

    Raises:
        PluginError: tensorrt_rtx is not loaded, or the platform is not 64-bit Linux on x86_64 or aarch64.
    """
    global _loaded  # noqa: PLW0603 - the loader's state is the process's, and so is this
    if _loaded is not None:
        return
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        raise PluginError(
            f"plugin nodes on TensorRT-RTX: the platform is {sys.platform} on {machine}; "
            f"expected linux on one of {', '.join(_MACHINES)}",
            hint="build with another lowering: --lowering compact or --lowering if",
        )
    if not _is_loaded(VERSIONED):
        raise PluginError(
            f"plugin nodes on TensorRT-RTX: {VERSIONED} is not loaded in this process; expected it to be",
            hint="import tensorrt_rtx first",
        )
    if _is_loaded(UNVERSIONED):  # a development installation brings the name itself
        return
    with tempfile.TemporaryDirectory(prefix="dlo-rtx-") as folder:
        stub = Path(folder) / UNVERSIONED
        stub.write_bytes(stub_library(machine, UNVERSIONED, VERSIONED))
        _loaded = ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)  # stays mapped when the file is gone


def _is_loaded(name: str) -> bool:
    """Whether an object of this soname is in the process: RTLD_NOLOAD finds, and never loads."""
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL | _RTLD_NOLOAD)
    except OSError:
        return False
    return True


def stub_library(machine: str, soname: str, needed: str) -> bytes:
    """A shared object with a soname, one dependency, and no symbols (ELF-64, System V ABI chapters 4 and 5).

    Args:
        machine: As platform.machine() names it, "x86_64" or "aarch64".
        soname: What a dlopen may ask for.
        needed: Soname of a loaded library, found by a dlsym in this one.
    """
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    strings += bytes(-len(strings) % 8)
    symbols_at = _HEADER_BYTES + 2 * _PROGRAM_HEADER_BYTES
    hash_at = symbols_at + _SYMBOL_BYTES
    hash_table = struct.pack("<4I", 1, 1, 0, 0)  # one bucket, one symbol: the null symbol
    strings_at = hash_at + len(hash_table)
    dynamic_at = strings_at + len(strings)
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (_DT_NEEDED, 2 + len(soname)),
            (_DT_SONAME, 1),
            (_DT_HASH, hash_at),
            (_DT_STRTAB, strings_at),
            (_DT_SYMTAB, symbols_at),
            (_DT_STRSZ, len(strings)),
            (_DT_SYMENT, _SYMBOL_BYTES),
            (_DT_NULL, 0),
        )
    )
    total = dynamic_at + len(dynamic)
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64-bit, little-endian, version 1
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH",
        3,
        _MACHINES[machine],
        1,
        0,
        _HEADER_BYTES,
        0,
        0,
        _HEADER_BYTES,
        _PROGRAM_HEADER_BYTES,
        2,
        64,
        0,
        0,
    )
    programs = struct.pack("<IIQQQQQQ", _PT_LOAD, _PF_READ_WRITE, 0, 0, 0, total, total, _PAGE)
    # the loader writes relocated addresses into the dynamic section: hence read-write
    programs += struct.pack(
        "<IIQQQQQQ", _PT_DYNAMIC, _PF_READ_WRITE, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8
    )
    return header + programs + bytes(_SYMBOL_BYTES) + hash_table + strings + dynamic
