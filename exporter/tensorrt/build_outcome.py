"""How a build ended, as a result or as the error a user sees."""

from __future__ import annotations

import itertools
import re
import signal
from typing import Any

from dlo_export.checkpoints.errors import DloError, EngineBuildError, InputError, MachineError
from dlo_export.exporter.tensorrt.build_process import BuildProcess
from dlo_export.runtimes.tensorrt.backend import BACKENDS

_KINDS: dict[str, type[DloError]] = {error.__name__: error for error in (EngineBuildError, MachineError, InputError)}
_LINES_SHOWN = 5
_WHILE = {
    "": "starting",
    "import": "importing the backend",
    "parse": "parsing",
    "checks": "checking the network",
    "build": "building",
    "write": "writing the engine",
}
_HINT = "\n\nhint: "
_PLUGIN_EXCEPTION = re.compile(r"\[ERROR\] Exception caught in \w+\(\): (?:\w+: )?(?P<reason>.*)")


def outcome(build: BuildProcess) -> dict[str, Any]:
    """What a build that has ended made.

    Args:
        build: Both its pipes are at their end, or it was killed for its timeout.

    Raises:
        EngineBuildError: TensorRT refused or crashed, or the build was killed.
        MachineError: Memory or disk ran out.
        RuntimeError: A bug of ours.
    """
    status = build.wait()
    if build.timed_out:
        said = f"was killed after its timeout of {build.request.timeout_s:g} s"
        raise _ended(build, EngineBuildError, said, "allow more time, --trt-timeout, or leave that out")
    if build.result is not None:
        return build.result
    if build.failure is not None:
        kind, message = build.failure["kind"], build.failure["message"]
        if kind not in _KINDS:
            raise RuntimeError(f"{build.request.graph.name}: the building process failed:\n{message}")
        raise _KINDS[kind](_with_plugin_reasons(message, list(build.log)))
    if status == -signal.SIGKILL and build.may_be_out_of_memory:
        peak = max((stage.peak_bytes for stage in build.stages), default=0)
        raise _ended(
            build,
            MachineError,
            f"was killed by the kernel because memory ran out (its earlier stages took {peak / 2**30:.1f} GB)",
            "build fewer engines at once, close other programs, or build on a larger machine",
        )
    if status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        how = f"was killed by somebody's {signal.Signals(-status).name}, memory not having run out,"
        raise _ended(build, EngineBuildError, how, "run it again")
    how = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    raise _ended(
        build,
        EngineBuildError,
        how,
        "the fault is in TensorRT; report it there with the graph, or use another lowering or version",
    )


def _with_plugin_reasons(message: str, log: list[str]) -> str:
    """A message with what Python plugins raised, which TensorRT prints and passes on as a number."""
    text, _, hint = message.partition(_HINT)
    for line, following in itertools.pairwise([*log, ""]):
        if match := _PLUGIN_EXCEPTION.match(line):
            text += f"\n  {match['reason']}"
            hint = following.removeprefix(_HINT.lstrip()) if following.startswith(_HINT.lstrip()) else hint
    return f"{text}{_HINT}{hint}" if hint else text


def _ended(build: BuildProcess, kind: type[DloError], how: str, hint: str) -> DloError:
    request = build.request
    doing = _WHILE[build.stage] + (f", at: {build.doing}" if build.doing else "")
    lines = "".join(f"\n  {line}" for line in list(build.log)[-_LINES_SHOWN:])
    last = f"\nits last log lines:{lines}" if lines else ""
    return kind(
        f"{request.graph.name}: the {BACKENDS[request.backend].title} build {how} while {doing}{last}",
        hint=hint,
    )
