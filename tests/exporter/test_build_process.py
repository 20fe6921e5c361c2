"""Builds that end badly: every end is named, and nothing is left behind. The builds and their deaths are real."""

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import EngineBuildError, MachineError
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.build_process import BuildProcess, count_oom_kills
from dlo_export.exporter.tensorrt.build_queue import Planned, run_builds
from dlo_export.exporter.tensorrt.engines import build_engine
from tests.exporter.tiny_engines import FILES, save_request

ROOT = Path(__file__).parents[2]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "engines").mkdir()
    return save_request(tmp_path)


def run(asked, at, act):
    """Builds, and calls `act` with the worker's process id when it reaches a stage."""
    started = []

    def listen(event):
        if event["event"] == "started":
            started.append(event["process_id"])
        if event["event"] == "stage_started" and event["name"] == at:
            act(started[0])

    try:
        return run_builds([Planned(asked, None, 0, listen)])
    finally:
        assert not is_alive(started[0])


def is_alive(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
@pytest.mark.parametrize(("stage", "doing"), [("parse", "parsing"), ("build", "building")])
def test_build_names_stage_and_signal_when_builder_crashes(tmp_path, asked, number, stage, doing):
    with pytest.raises(
        EngineBuildError, match=rf"TensorRT-RTX build crashed with {number.name} while {doing}"
    ) as caught:
        run(asked, stage, lambda worker: os.kill(worker, number))
    assert caught.value.exit_code == 3
    assert "hint: the fault is in TensorRT" in str(caught.value)
    assert files(tmp_path) == FILES


def test_build_names_the_node_when_parser_aborts(tmp_path, monkeypatch):
    """It really does: a plugin's creator is registered, and the library the parser then loads is not provided."""
    (tmp_path / "customize").mkdir()
    (tmp_path / "customize" / "sitecustomize.py").write_text(REGISTER_CREATORS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "customize"))
    asked = save_request(tmp_path, "plugin", plugin_operators=())
    asked.output.parent.mkdir()
    with pytest.raises(EngineBuildError, match="crashed with SIGABRT while parsing") as caught:
        run(asked, "parse", lambda worker: None)
    assert "at: parsing node 'model.layers.0.mlp.skip_gate_up' (SkipGateUp)" in str(caught.value)
    assert "terminate called without an active exception" in str(caught.value)


REGISTER_CREATORS = f"""
import sys
if "-m" in sys.orig_argv:
    sys.path.insert(0, {str(ROOT)!r})
    import tensorrt_rtx as trt
    from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS
    from dlo_export.plugins.rtx_twins import PluginTwinCreator
    creators = [PluginTwinCreator(op) for op in PLUGIN_OPS.values()]
    for creator in creators:
        trt.get_plugin_registry().register_creator(creator, DOMAIN)
"""


def test_build_says_who_when_worker_is_killed(tmp_path, asked):
    with pytest.raises(EngineBuildError, match=r"killed by somebody's SIGKILL, .* while building"):
        run(asked, "build", lambda worker: os.kill(worker, signal.SIGKILL))
    assert files(tmp_path) == FILES


def test_build_is_killed_when_timeout_passes(tmp_path, asked):
    asked = dataclasses.replace(asked, timeout_s=5)
    with pytest.raises(EngineBuildError, match=r"was killed after its timeout of 5 s while building") as caught:
        run(asked, "build", lambda worker: os.kill(worker, signal.SIGSTOP))
    assert caught.value.exit_code == 3
    assert files(tmp_path) == FILES


def test_build_leaves_nothing_when_command_is_interrupted(tmp_path, asked):
    def interrupt(worker):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(asked, "build", interrupt)
    assert files(tmp_path) == FILES


def test_build_fails_when_file_grows_beyond_the_limit(tmp_path, asked):
    limit = (10_000, 10_000)  # bytes, less than any engine
    with pytest.raises(MachineError, match=r"model\.engine: cannot be written: File too large") as caught:
        run(asked, "build", lambda worker: resource.prlimit(worker, resource.RLIMIT_FSIZE, limit))
    assert caught.value.exit_code == 4
    assert files(tmp_path) == FILES


def test_build_fails_when_disk_is_full(tmp_path, asked):
    """/dev/full answers every write as a full disk does."""
    with pytest.raises(MachineError, match=r"model\.engine: cannot be written: the disk is full") as caught:
        run(asked, "build", lambda worker: partial_of(asked).symlink_to("/dev/full"))
    assert caught.value.exit_code == 4
    assert files(tmp_path) == FILES
    assert Path("/dev/full").exists()


def test_build_fails_when_address_space_runs_out(tmp_path, asked):
    def limit(worker):
        used = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(worker, resource.RLIMIT_AS, (used + 2**22, used + 2**22))

    with pytest.raises((EngineBuildError, MachineError), match=r"\n\nhint: "):
        run(asked, "build", limit)
    assert files(tmp_path) == FILES


def partial_of(asked):
    return asked.output.with_name(f".{asked.output.name}.{os.getpid()}.partial")


def test_build_removes_what_it_wrote_when_it_is_terminated(tmp_path, asked):
    """It waits in the middle of writing, because a pipe without a reader is in the file's place."""

    def terminate(worker):
        threading.Timer(0.3, os.kill, (worker, signal.SIGTERM)).start()

    os.mkfifo(partial_of(asked))
    with pytest.raises(EngineBuildError, match=r"was killed by somebody's SIGTERM, .* while writing the engine"):
        run(asked, "write", terminate)
    assert files(tmp_path) == FILES


@pytest.mark.parametrize("stage", ["build", "write"])
def test_worker_ends_and_leaves_nothing_when_its_parent_dies(tmp_path, asked, stage):
    """The parent is killed at once, so that nothing of its own can clean up; the worker waits as above."""
    script = f"""
        import os, signal, sys
        from dlo_export.exporter.tensorrt.engine_request import EngineRequest
        from dlo_export.exporter.tensorrt.build_queue import Planned, run_builds
        request = EngineRequest.from_json(sys.stdin.readline())
        def listen(event):
            if event["event"] == "started":
                print(event["process_id"], flush=True)
            if event["event"] == "stage_started" and event["name"] == "checks":
                os.mkfifo(request.output.with_name(f".{{request.output.name}}.{{os.getpid()}}.partial"))
            if event["event"] == "stage_started" and event["name"] == {stage!r}:
                time.sleep(0.3 if {stage!r} == "write" else 0)
                os.kill(os.getpid(), signal.SIGKILL)
        run_builds([Planned(request, None, 0, listen)])
    """
    command = [sys.executable, "-c", "import time\n" + textwrap.dedent(script)]
    result = subprocess.run(
        command, input=asked.to_json() + "\n", cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    while is_alive(int(result.stdout)):
        time.sleep(0.02)
    left = files(tmp_path)
    if stage == "build":
        left = [name for name in left if not name.endswith(".partial")]  # the pipe, which the test made
    assert left == FILES


def test_worker_dies_at_once_when_its_parent_is_gone_before_it_starts(asked):
    result = subprocess.run(
        [sys.executable, "-m", "dlo_export.exporter.tensorrt.build_worker", "1", "1"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == b""


def test_log_keeps_real_lines_when_noise_lies_between(asked):
    build = BuildProcess(asked, None, lambda event: None)
    for line in (
        "ERROR: [a.cpp::b::1] Error Code 1: Cuda Runtime (In b at /_src/a.cpp:1 (cudaError 35: CUDA driver version))",
        "ERROR: first",
        "WARNING: ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.",
        "ERROR: [a.cpp::b::1] Error Code 1: Cuda Runtime (In b at /_src/a.cpp:1 (cudaError 2: out of memory))",
    ):
        build._keep(line)
    assert [line[:12] for line in build.log] == ["ERROR: first", "ERROR: [a.cp"]
    build.kill()


def test_build_engine_leaves_no_descriptor_open_when_builds_fail(tmp_path, asked):
    before = open_descriptors()
    broken = dataclasses.replace(asked, profiles=())
    for _ in range(2):
        with pytest.raises(EngineBuildError, match="no optimization profile"):
            build_engine(broken, Reporter())
    assert open_descriptors() <= before  # of earlier tests', some may be closed meanwhile


def open_descriptors():
    """Numbers, and what they are of."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def test_count_oom_kills_adds_machine_and_control_group_when_both_count(tmp_path):
    vmstat, cgroup = tmp_path / "vmstat", tmp_path / "cgroup"
    assert count_oom_kills(vmstat, cgroup) == 0
    vmstat.write_text("nr_free_pages 7\noom_kill 2\n")
    assert count_oom_kills(vmstat, cgroup) == 2
    cgroup.mkdir()
    (cgroup / "memory.events").write_text("oom 9\noom_kill 3\noom_group_kill 1\n")
    assert count_oom_kills(vmstat, cgroup) == 5
