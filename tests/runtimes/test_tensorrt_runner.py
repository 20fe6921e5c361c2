"""Everything of the TensorRT runner that happens on a machine without a GPU."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx
from cuda.bindings import runtime as cuda_runtime

from dlo_export.plugins.errors import PluginError
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.tensorrt import device as tensorrt_device
from dlo_export.runtimes.tensorrt import engine_runtime as tensorrt_runtime
from dlo_export.runtimes.tensorrt import execution as tensorrt_execution
from dlo_export.runtimes.tensorrt.engine_runtime import EngineRuntime
from dlo_export.runtimes.tensorrt.engines import load_engines
from dlo_export.runtimes.tensorrt.execution import reason_not_to_capture
from dlo_export.runtimes.tensorrt.runner import TensorRtRunner
from tests.runtimes.engine_records import changed_build, interface, record, save_artefact

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def engine(tmp_path: Path) -> EngineRecord:
    """Described rightly, but no engine."""
    return load_engines(save_artefact(tmp_path, record(tmp_path)))[0]


def test_runner_says_what_is_missing_when_there_is_no_gpu(tmp_path: Path) -> None:
    """In a process of its own, that a GPU of this machine can be hidden from."""
    folder = save_artefact(tmp_path, record(tmp_path))
    code = (
        f"from dlo_export.runtimes.tensorrt.runner import TensorRtRunner; TensorRtRunner.of_artefact({str(folder)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=NO_GPU, check=False)
    last = result.stderr[result.stderr.index("dlo_export.runtimes.errors.BackendUnavailableError") :]
    assert "TensorRT: no GPU can be used: cudaGetDeviceCount failed with cudaError" in last
    assert "hint: run it on a machine with an NVIDIA GPU" in last
    assert BackendUnavailableError.exit_code == 4


def test_runner_refuses_before_it_looks_for_a_gpu_when_an_engine_cannot_run(engine: EngineRecord) -> None:
    with pytest.raises(BackendUnavailableError, match=r"was built with TensorRT-RTX 1\.0\.0, installed is"):
        TensorRtRunner([changed_build(engine, version="1.0.0")])


def test_engine_is_explained_when_it_is_damaged(engine: EngineRecord) -> None:
    with pytest.raises(ModelLoadError) as info:
        EngineRuntime(engine).deserialize(engine)
    assert f"{engine.file}: TensorRT-RTX {engine.build.version} cannot load it: " in str(info.value)
    assert "MALFORMED_ENGINE" in str(info.value)
    assert "catchCudaError" not in str(info.value)


def test_plugin_library_is_loaded_only_when_the_engine_has_plugins(engine: EngineRecord, tmp_path: Path) -> None:
    library = tmp_path / "libdlo_plugins.so"
    library.write_bytes(b"no library")
    EngineRuntime(engine, library)
    with pytest.raises(PluginError, match="has no getCreators"):
        EngineRuntime(dataclasses.replace(engine, plugin_operators=("dlo::SkipDown",)), library)


def test_engines_are_refused_when_they_are_not_of_one_model(engine: EngineRecord, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="got no engines"):
        TensorRtRunner([])
    logits, *cache = interface().outputs
    other = interface(outputs=(dataclasses.replace(logits, dtype="bfloat16"), *cache))
    with pytest.raises(ModelLoadError, match="differ in backend, version or interface"):
        TensorRtRunner([engine, record(tmp_path, "decode", interface=other)])


def test_decode_is_captured_when_the_artefact_says_that_it_can_be(engine: EngineRecord) -> None:
    def reason(problem: str | None, capture: bool = True, profiled: bool = False) -> str | None:
        return reason_not_to_capture([dataclasses.replace(engine, capture_problem=problem)], capture, profiled)

    assert reason(None) is None
    assert reason("its shapes vary") == "not captured: lowering plugin, its shapes vary"
    assert "switched off" in str(reason(None, capture=False))
    assert "timed" in str(reason(None, profiled=True))
    prefill, decode = (
        dataclasses.replace(engine, capture_problem=problem, profiles=(profile,))
        for problem, profile in zip(("its shapes vary", None), engine.profiles, strict=True)
    )
    assert reason_not_to_capture([prefill, decode], capture=True, profiled=False) is None


@pytest.mark.parametrize(
    ("module", "variable", "known"),
    [
        (tensorrt_execution, "context", tensorrt_rtx.IExecutionContext),
        (tensorrt_runtime, "engine", tensorrt_rtx.ICudaEngine),
        (tensorrt_runtime, "config", tensorrt_rtx.IRuntimeConfig),
        (tensorrt_runtime, "_runtime", tensorrt_rtx.Runtime),
    ],
)
def test_runner_calls_only_what_the_backend_has(module: object, variable: str, known: type) -> None:
    """What cannot be run without a GPU can at least not be misspelt."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute)
        and variable in (getattr(node.value, "id", None), getattr(node.value, "attr", None))
    }
    assert used
    assert not {name for name in used if not hasattr(known, name)}


def test_device_calls_only_what_the_bindings_have() -> None:
    tree = ast.parse(Path(tensorrt_device.__file__).read_text())
    called = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", None) == "_call"
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(called) > 10
    assert not {name for name in called if not hasattr(cuda_runtime, str(name))}
