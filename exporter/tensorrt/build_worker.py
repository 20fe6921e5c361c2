"""The process that builds one engine: TensorRT can abort, hang or be killed without taking the command with it.

Run as `python -m dlo_export.exporter.tensorrt.build_worker EVENTS PARENT`, EVENTS being the descriptor of a pipe for
`EventPipe`, PARENT the parent's process id; the request is one line of JSON on stdin. What TensorRT's libraries print
goes to stdout and stderr.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from dlo_export.checkpoints.errors import DloError, EngineBuildError, MachineError
from dlo_export.exporter.tensorrt.build import Workplace, build
from dlo_export.exporter.tensorrt.build_events import EventPipe
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.plugins.errors import PluginError

_PR_SET_PDEATHSIG = 1
# Disk full, quota, file larger than the file system or the process's limit allows, no right to write.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def main() -> NoReturn:
    """Builds, and tells how it ended; the exit code is 0 whenever that could be told."""
    pipe, parent = EventPipe(int(sys.argv[1])), int(sys.argv[2])
    die_with_parent(parent)
    pipe.send("started", process_id=os.getpid())
    values = json.loads(sys.stdin.readline())
    request = EngineRequest.from_json(json.dumps(values["request"]))
    timing_cache = values["timing_cache"]
    workplace = Workplace(Path(values["partial"]), None if timing_cache is None else Path(timing_cache))
    try:
        pipe.send("result", **build(request, workplace, pipe))
    except SystemExit:  # terminated while it wrote, which it has cleaned up after
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:  # the parent is told of whatever it is, and decides
        pipe.send("failure", **_failure(error, request))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the destructors of TensorRT's libraries: the engine is written, and they can only crash.
    os._exit(0)


def die_with_parent(parent: int) -> None:
    """Has the kernel end this process when its parent ends (Linux, prctl(2)).

    By SIGTERM, which ends native code at once and lets Python code remove the file it is writing.
    """
    if sys.platform != "linux":
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)


def _failure(error: BaseException, request: EngineRequest) -> dict[str, Any]:
    if isinstance(error, PluginError):
        return _failure(EngineBuildError(error.message, hint=error.hint), request)
    if isinstance(error, DloError):
        return {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, MemoryError):
        fault = MachineError(f"{request.graph.name}: the build ran out of memory", hint="build on a larger machine")
        return _failure(fault, request)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        where = f"{request.output}: cannot be written: {reason}"
        return _failure(MachineError(where, hint="free some space, or give another folder with -o"), request)
    return {"kind": "bug", "message": "".join(traceback.format_exception(error))}


if __name__ == "__main__":
    main()
