"""Everything of the TensorRT runner that happens on a machine without a GPU."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx
from cuda.bindings import runtime as cuda_runtime
from dlo_export.runtimes.tensorrt.engine_file import EngineFile, load_engine_files

from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.tensorrt import backend as tensorrt_backend
from dlo_export.runtimes.tensorrt import device as tensorrt_device
from dlo_export.runtimes.tensorrt import execution as tensorrt_execution
from dlo_export.runtimes.tensorrt.backend import Backend
from dlo_export.runtimes.tensorrt.execution import reason_not_to_capture
from dlo_export.runtimes.tensorrt.runner import TensorRtRunner
from tests.runtimes.engine_records import interface, record, save_artefact

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def engine(tmp_path: Path) -> EngineFile:
    """Described rightly, but no engine."""
    return load_engine_files(save_artefact(tmp_path, record()))[0]


def test_runner_says_what_is_missing_when_there_is_no_gpu(tmp_path: Path) -> None:
    """In a process of its own, that a GPU of this machine can be hidden from."""
    folder = save_artefact(tmp_path, record())
    code = (
        f"from dlo_export.runtimes.tensorrt.runner import TensorRtRunner; TensorRtRunner.of_artefact({str(folder)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=NO_GPU, check=False)
    last = result.stderr[result.stderr.index("dlo_export.runtimes.errors.BackendUnavailableError") :]
    assert "TensorRT: no GPU can be used: cudaGetDeviceCount failed with cudaError" in last
    assert "hint: run it on a machine with an NVIDIA GPU" in last
    assert BackendUnavailableError.exit_code == 4


def test_engine_is_refused_when_the_backend_has_another_version(engine: EngineFile) -> None:
    stale = dataclasses.replace(engine, version="1.0.0")
    with pytest.raises(BackendUnavailableError) as info:
        TensorRtRunner([stale])
    found = tensorrt_rtx.__version__
    assert f"was built with tensorrt_rtx 1.0.0, this machine has {found}" in str(info.value)
    assert "hint: pip install tensorrt-rtx==1.0.0, or export the model again" in str(info.value)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="enterprise TensorRT is installed")
def test_engine_is_refused_when_the_backend_is_not_installed(engine: EngineFile) -> None:
    with pytest.raises(BackendUnavailableError, match=r"tensorrt 11\.4\.0, which cannot be imported"):
        TensorRtRunner([dataclasses.replace(engine, backend="tensorrt", version="11.4.0")])


def test_engine_is_explained_when_it_is_damaged(engine: EngineFile) -> None:
    with pytest.raises(ModelLoadError) as info:
        Backend(engine).deserialize(engine)
    assert f"{engine.path}: tensorrt_rtx {engine.version} cannot load it: " in str(info.value)
    assert "MALFORMED_ENGINE" in str(info.value)
    assert "catchCudaError" not in str(info.value)


def test_engine_is_refused_when_it_was_built_for_other_gpus(engine: EngineFile) -> None:
    backend = Backend(engine)
    backend.check_target(engine, "sm89")
    backend.check_target(dataclasses.replace(engine, targets=()), "sm120")
    with pytest.raises(ModelLoadError, match=r"was built for sm89, this GPU is sm120\s+hint: .*--trt-target sm120"):
        backend.check_target(engine, "sm120")


def test_plugin_library_is_refused_when_it_is_not_the_one_built_with(engine: EngineFile, tmp_path: Path) -> None:
    backend = Backend(engine)
    backend.load_plugins(engine, None)
    library = tmp_path / "libdlo_plugins.so"
    with pytest.raises(ModelLoadError, match="which describe shapes and have no kernels"):
        backend.load_plugins(dataclasses.replace(engine, plugins="twins"), None)
    needing = dataclasses.replace(engine, plugins="library", plugin_library_sha256="0" * 64)
    with pytest.raises(ModelLoadError, match="and none was given"):
        backend.load_plugins(needing, None)
    with pytest.raises(ModelLoadError, match="no such file"):
        backend.load_plugins(needing, library)
    library.write_bytes(b"no library")
    with pytest.raises(ModelLoadError, match="was built with 000000000000…"):
        backend.load_plugins(needing, library)
    needing = dataclasses.replace(needing, plugin_library=library, plugin_library_sha256=file_sha256(library))
    with pytest.raises(ModelLoadError, match=r"tensorrt_rtx cannot load it: .*Unable to load library"):
        backend.load_plugins(needing)


def test_engines_are_refused_when_they_are_not_of_one_model(engine: EngineFile, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="got no engines"):
        TensorRtRunner([])
    other = interface()
    other["outputs"][0]["dtype"] = "bfloat16"
    (decode,) = load_engine_files(save_artefact(tmp_path / "other", record(interface=other)))
    with pytest.raises(ModelLoadError, match="differ in backend, version or interface"):
        TensorRtRunner([engine, decode])


def test_decode_is_captured_when_the_lowering_has_fixed_shapes_and_no_branches(engine: EngineFile) -> None:
    def reason(lowering: str, capture: bool = True, profiled: bool = False) -> str | None:
        return reason_not_to_capture([dataclasses.replace(engine, lowering=lowering)], capture, profiled)

    assert [reason(lowering) for lowering in ("plugin", "none")] == [None, None]
    assert "data-dependent shapes" in str(reason("compact"))
    assert "which branch" in str(reason("if"))
    assert "switched off" in str(reason("plugin", capture=False))
    assert "timed" in str(reason("plugin", profiled=True))
    prefill, decode = (
        dataclasses.replace(engine, lowering=lowering, profiles=(profile,))
        for lowering, profile in zip(("compact", "plugin"), engine.profiles, strict=True)
    )
    assert reason_not_to_capture([prefill, decode], capture=True, profiled=False) is None


@pytest.mark.parametrize(
    ("module", "variable", "known"),
    [
        (tensorrt_execution, "context", tensorrt_rtx.IExecutionContext),
        (tensorrt_backend, "engine", tensorrt_rtx.ICudaEngine),
        (tensorrt_backend, "config", tensorrt_rtx.IRuntimeConfig),
        (tensorrt_backend, "_runtime", tensorrt_rtx.Runtime),
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
