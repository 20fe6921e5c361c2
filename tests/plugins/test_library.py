"""libdlo_plugins.so, built against the TensorRT headers that the environment variable TensorRT_ROOT points to."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS, VERSION
from dlo_export.plugins.contract import SIZES_HINT, T_DTYPES
from tests.plugins.test_rtx_plugins import build

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "library"
TENSORRT_ROOT = os.environ.get("TensorRT_ROOT")  # noqa: SIM112 - CMake's spelling
if not TENSORRT_ROOT:
    pytest.skip("libdlo_plugins.so: TensorRT_ROOT is not given", allow_module_level=True)


def has_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    command = ["make", "-C", str(SOURCES), f"PYTHON={sys.executable}", f"TensorRT_ROOT={TENSORRT_ROOT}"]
    subprocess.run([*command, f"BUILD={folder}"], check=True)
    return folder / "libdlo_plugins.so"


@pytest.fixture(scope="module")
def answers(library):
    """What library_probe.cpp prints."""
    subprocess.run(["cmake", "--build", str(library.parent), "--target", "library_probe"], check=True)
    program = library.with_name("library_probe")
    result = subprocess.run([str(program), str(library)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def host(library):
    """benchmarks/plugin_host.cpp, built."""
    subprocess.run(["cmake", "--build", str(library.parent), "--target", "plugin_host"], check=True)
    return library.with_name("plugin_host")


def test_host_creates_the_plugins_and_names_the_driver_when_there_is_none(library, host, tmp_path):
    if has_driver():
        pytest.skip("plugin_host: a CUDA driver is here")
    result = subprocess.run([host, library, tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert result.stderr.startswith("plugin_host: no CUDA driver: libcuda.so.1")
    assert subprocess.run([host, host, tmp_path], capture_output=True, check=False).returncode == 1


def test_library_links_neither_tensorrt_nor_cuda_when_built(library):
    assert shutil.which("readelf"), "binutils come with the compiler"
    result = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1].rstrip("]") for line in result.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if any(word in name for word in ("nvinfer", "tensorrt", "cuda"))]


@pytest.mark.parametrize("t_dtype", T_DTYPES)
def test_plugin_graph_builds_into_an_rtx_engine_when_the_library_is_loaded(library, t_dtype):
    answer = build(library, t_dtype)
    assert answer["after"] == [], "creators in the registry of TensorRT-RTX"
    assert answer["fields"] == {"SkipGateUp": 0, "SkipDown": 0}
    assert answer["parsed"], answer
    twins = build("twins", t_dtype)
    assert answer["output"] == twins["output"]
    assert answer["engine"] > 3 * 64 * 96 * (4 if t_dtype == "float32" else 2)


def test_another_library_is_refused_when_one_is_loaded(library, tmp_path):
    other = shutil.copy(library, tmp_path / "other.so")
    code = (
        "import sys, tensorrt_rtx; from dlo_export.plugins.registration import load_library;"
        "[load_library(tensorrt_rtx, path) for path in sys.argv[1:]]"
    )
    command = [sys.executable, "-c", code, str(library), str(other)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode
    assert f"plugin library {other}: SkipGateUp, SkipDown came from {library} already" in result.stderr


def test_library_refuses_with_sizes_when_a_width_is_no_multiple_of_eight(library):
    answer = build(library, "bfloat16", hidden=60, intermediate=100)
    assert answer["parsed"] is False
    (message,) = [line for line in answer["errors"] if line.startswith("dlo::SkipGateUp")]
    assert "input 'hidden_states' has hidden 60; expected a multiple of 8" in message
    assert "input 'up_weight' has intermediate 100; expected a multiple of 8" in message
    assert f"hint: {SIZES_HINT}" in message


def test_creators_are_the_schemas_when_the_library_is_asked(answers):
    assert [line for line in answers if line.startswith("creator: ")] == [
        f"creator: {DOMAIN} {name} {VERSION} fields 0" for name in PLUGIN_OPS
    ]


def test_a_kernel_is_found_for_every_gpu_from_ampere_on_when_asked(answers):
    """Cubins of 8.x serve later minor versions; from 9.0 on each serves its own; portable PTX serves the rest."""
    found = dict(line.removeprefix("kernel ").split(": ") for line in answers if line.startswith("kernel "))
    assert found == {
        "7.5": "none",
        "8.0": "cubin 8.0 whole",
        "8.6": "cubin 8.6 whole",
        "8.7": "cubin 8.6 whole",
        "8.9": "cubin 8.9 whole",
        "9.0": "cubin 9.0 whole",
        "10.0": "cubin 10.0 whole",
        "10.3": "ptx 8.0 whole",
        "12.0": "cubin 12.0 whole",
        "12.1": "ptx 8.0 whole",
    }


def test_library_says_why_when_it_runs_without_a_driver(answers):
    if has_driver():
        pytest.skip("libdlo_plugins.so: a CUDA driver is here")
    refusal = "log: dlo::SkipDown: no CUDA driver: libcuda.so.1: cannot open shared object file: "
    refusal += "No such file or directory"
    hint = ["", "hint: the dlo kernels need an NVIDIA GPU"]
    assert answers[answers.index("build phase") :] == [
        "build phase",
        "onShapeChange: 0",  # an engine may be built without a driver
        *[refusal, *hint, "enqueue: -1"],
        "enqueue of nothing: 0",
        "runtime phase",
        *[refusal, *hint, "onShapeChange: -1"],
        *[refusal, *hint, "enqueue: -1"],
        "enqueue of nothing: 0",
    ]
