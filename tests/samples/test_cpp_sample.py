from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "samples" / "cpp"
ROOT = os.environ.get("TensorRT_ROOT")  # noqa: SIM112 - CMake's name for it

pytestmark = pytest.mark.skipif(
    not ROOT or shutil.which("cmake") is None,
    reason="samples/cpp is not compiled: TensorRT_ROOT (TensorRT's headers) is not set, or there is no cmake",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dlo_generate, compiled against the headers of $TensorRT_ROOT."""
    assert ROOT is not None
    build = tmp_path_factory.mktemp("cpp")
    options = [f"-DTensorRT_ROOT={ROOT}", *_library(Path(ROOT))]
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(build), *options, "-DCMAKE_CXX_FLAGS=-Werror"],
        ["cmake", "--build", str(build)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return build / "dlo_generate"


def _library(root: Path) -> list[str]:
    """What to link: the installation's TensorRT, or else the tensorrt-rtx wheel's, which comes without headers."""
    if [*root.glob("lib*/libnvinfer.so*")]:
        return []
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    assert found is not None
    (library,) = [
        file for folder in found.submodule_search_locations or () for file in Path(folder).glob("libtensorrt_rtx.so.*")
    ]
    return ["-DDLO_BACKEND=rtx", f"-DTensorRT_LIBRARY={library}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: dlo_generate ENGINE"),
        (["model.engine", "--tokens", "1,x"], "--tokens got 'x', expected a number >= 0"),
        (["model.engine", "--tokens", "1", "--new", "-3"], "--new got '-3', expected a number >= 0"),
        (["model.engine", "--token", "1"], "--token is unknown, expected --tokens, --new, --end or --plugins"),
    ],
)
def test_sample_ends_with_2_when_arguments_are_wrong(program: Path, arguments: list[str], message: str) -> None:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_sample_ends_with_4_when_there_is_no_gpu(program: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [program, "model.engine", "--tokens", "1,2"], capture_output=True, text=True, check=False, env=environment
    )
    assert (result.returncode, result.stdout) == (4, "")
    assert "error: no GPU can be used: " in result.stderr
