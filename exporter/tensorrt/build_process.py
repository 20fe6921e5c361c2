"""A building process seen from its parent: its events, its output, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dlo_export
from dlo_export.exporter.tensorrt.build_events import EventReader
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.runtimes.artefact.engine_record import StageCost
from dlo_export.runtimes.tensorrt.backend import BACKENDS

_WORKER = "dlo_export.exporter.tensorrt.build_worker"
_LINES_KEPT = 200
_READ_AT_ONCE = 2**16
_PACKAGE_PARENT = Path(dlo_export.__file__).resolve().parents[1]
_VMSTAT = Path("/proc/vmstat")
_CGROUP = Path("/sys/fs/cgroup")


class BuildProcess:
    """Starts a build at once.

    Args:
        request: What to build.
        timing_cache: File of the timing cache, None for none.
        listener: Called with every event.

    Attributes:
        process_id: Of the child.
        stages: Those finished.
        stage: The one under way, empty before the first.
        doing: The last thing it said it was at.
        log: Its last lines that are not noise, in order.
        result: What it built; None until then.
        failure: Why it gave up, by its own account; None unless it did.
        timed_out: Whether it was killed for its timeout.
    """

    def __init__(
        self, request: EngineRequest, timing_cache: Path | None, listener: Callable[[dict[str, Any]], None]
    ) -> None:
        self.request, self._listener = request, listener
        self.stages: list[StageCost] = []
        self.stage = self.doing = ""
        self.log: deque[str] = deque(maxlen=_LINES_KEPT)
        self.result: dict[str, Any] | None = None
        self.failure: dict[str, str] | None = None
        self.timed_out = False
        self._oom_kills_before = count_oom_kills()
        self._reader, self._rest, self._backend = EventReader(), b"", BACKENDS[request.backend]
        self._deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self._partial = request.output.with_name(f".{request.output.name}.{os.getpid()}.partial")
        self.events, events_end = os.pipe()
        self.output, output_end = os.pipe()
        try:
            self._child = subprocess.Popen(
                # -P: a folder named `dlo_export` in the working directory is not ours.
                [sys.executable, "-P", "-m", _WORKER, str(events_end), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output_end,
                stderr=output_end,
                pass_fds=(events_end,),
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGE_PARENT), *_python_path()])},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child in its own way
            )
        except BaseException:
            os.close(self.events)
            os.close(self.output)
            raise
        finally:
            os.close(events_end)
            os.close(output_end)
        self._open = {self.events, self.output}
        self.process_id = self._child.pid
        self._send(timing_cache)

    def _send(self, timing_cache: Path | None) -> None:
        values = {
            "request": json.loads(self.request.to_json()),
            "partial": str(self._partial.absolute()),
            "timing_cache": None if timing_cache is None else str(timing_cache.absolute()),
        }
        assert self._child.stdin is not None
        try:
            with self._child.stdin as stdin:
                stdin.write(json.dumps(values).encode() + b"\n")
        except BrokenPipeError:
            return  # it is dead already; how it died is found out where every death is

    @property
    def seconds_left(self) -> float | None:
        """Until the timeout; None where there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def read(self, descriptor: int) -> bool:
        """Takes what has come on `events` or `output`; False when nothing more will."""
        data = os.read(descriptor, _READ_AT_ONCE)
        if not data:
            self._open.discard(descriptor)
            os.close(descriptor)
            return False
        if descriptor == self.events:
            for event in self._reader.feed(data):
                self._take(event)
        else:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._keep(line.decode(errors="replace").rstrip())
        return True

    @property
    def has_ended(self) -> bool:
        """Whether both pipes are at their end."""
        return not self._open

    def wait(self) -> int:
        """The child's exit status as subprocess gives it: negative for a signal. Removes what it left."""
        status = self._child.wait()
        rest, self._rest = self._rest, b""
        self._keep(rest.decode(errors="replace").rstrip())
        self._partial.unlink(missing_ok=True)
        return status

    @property
    def may_be_out_of_memory(self) -> bool:
        """Whether the kernel has killed for lack of memory since the build began."""
        return count_oom_kills() > self._oom_kills_before

    def kill(self) -> None:
        """Ends the child, whatever it is at, and removes what it wrote."""
        if self._child.poll() is None:
            os.killpg(self.process_id, signal.SIGKILL)
        for descriptor in tuple(self._open):
            os.close(descriptor)
        self._open.clear()
        self.wait()

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "stage_started":
            self.stage, self.doing = event["name"], ""
        elif kind == "stage_finished":
            self.stages.append(StageCost(event["name"], round(event["seconds"], 3), event["peak_bytes"]))
        elif kind == "doing":
            self.doing = event["text"]
        elif kind == "progress":
            self.doing = event["phase"]
        elif kind == "log":
            self._keep(f"{event['severity']}: {event['text']}")
        elif kind == "result":
            self.result = {name: value for name, value in event.items() if name != "event"}
        elif kind == "failure":
            self.failure = {"kind": event["kind"], "message": event["message"]}
        self._listener(event)

    def _keep(self, line: str) -> None:
        if line and not self._backend.is_noise(line):
            self.log.append(line)


def count_oom_kills(vmstat: Path = _VMSTAT, cgroup: Path = _CGROUP) -> int:
    """How often the kernel killed for lack of memory so far; only a growing number means something.

    Args:
        vmstat: Linux's /proc/vmstat; elsewhere missing, and 0 is returned.
        cgroup: Root of the control group (v2); its counter also grows where a container cannot see the machine's.
    """
    files = (vmstat, cgroup / "memory.events")
    lines = [line.split() for file in files if file.exists() for line in file.read_text().splitlines()]
    return sum(int(number) for name, number in lines if name == "oom_kill")


def _python_path() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return given.split(os.pathsep) if given else []
