"""How benchmarks end that are stopped or cannot go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parents[2]
_ENDING = "from benchmarks.common.endings import end_in_words; end_in_words()\n"
_WORKING = """
import signal, sys, time
from pathlib import Path
from benchmarks.common import workspace
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test may be run in a shell's background
workspace.WORKSPACE = Path(sys.argv[1])
with workspace.temporary_folder() as folder:
    (folder / "weights").touch()
    print("at work", flush=True)
    time.sleep(60)
"""


def _ended(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _ENDING + program]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)],
    ids=str,
)
def test_stopped_benchmark_leaves_no_folder_and_no_traceback(number: int, code: int, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDING + _WORKING, str(workspace)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    assert len(list(workspace.iterdir())) == 1
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (code, "", "")
    assert list(workspace.iterdir()) == []


def test_missing_package_is_named_by_whatever_benchmark_needs_it(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.matmul_rows", "--help"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 4
    assert done.stderr.startswith("error: this benchmark needs numpy, which is not installed\n\nhint: `make venv`")


def test_what_is_the_users_to_mend_is_told_as_dlo_tells_it() -> None:
    done = _ended(
        "from dlo_export.checkpoints.errors import MachineError\nraise MachineError('no GPU', hint='buy one')\n"
    )
    assert (done.returncode, done.stderr) == (4, "error: no GPU\n\nhint: buy one\n")


@pytest.mark.parametrize(
    "program",
    ["import dlo_export.checkpoints.errors\nprint(1 // 0)\n", "import dlo_export.nowhere\n", "print(1 // 0)\n"],
)
def test_fault_of_a_benchmark_shows_its_traceback(program: str) -> None:
    done = _ended(program)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("kernel_correctness", "--jit", "bfloat16", "decode"),
        ("lowerings", "--provider", "cuda", "--results", "grid.jsonl"),
        ("training_rate", "--device", "cuda"),
        ("training_speed", "--device", "cuda"),
    ],
    ids=lambda options: options[0],
)
def test_missing_gpu_is_told_before_anything_is_made(options: tuple[str, ...], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", f"benchmarks.{options[0]}", *options[1:]]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: ")
    assert "CUDA" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_library_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lowerings", "--results", str(tmp_path / "grid.jsonl")]
    command += ["--ort-plugin-library", "libdlo_ort.so"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "argument --ort-plugin-library: libdlo_ort.so is no file" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupt_of_the_clean_up_itself_leaves_no_folder_either(tmp_path: Path) -> None:
    program = f"""
import signal, sys
from pathlib import Path
from benchmarks.common import workspace
workspace.WORKSPACE = Path({str(tmp_path)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(lambda event, _: signal.raise_signal(signal.SIGINT) if event == "shutil.rmtree" else None)
with workspace.temporary_folder() as folder:
    (folder / "weights").touch()
"""
    done = _ended(program)
    assert (done.returncode, done.stderr) == (130, "")
    assert list(tmp_path.iterdir()) == []
