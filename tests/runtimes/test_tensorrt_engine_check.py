"""May an engine run here? Every reason against it, and none where there is none."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.tensorrt.engine_check import obstacles, require_runnable
from tests.runtimes.engine_records import changed_build, record


@pytest.fixture
def engine(tmp_path: Path) -> EngineRecord:
    return record(tmp_path)


def reasons(engine: EngineRecord, target: str | None = "sm89", library: Path | None = None) -> list[str]:
    return [obstacle.reason for obstacle in obstacles([engine], target, library)]


@pytest.mark.parametrize("target", ["sm89", None])
def test_engine_may_run_when_it_is_for_this_machine(engine: EngineRecord, target: str | None) -> None:
    require_runnable([engine], target)
    assert reasons(engine, target) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "1.0.0"}, f"was built with TensorRT-RTX 1.0.0, installed is {tensorrt_rtx.__version__}"),
        ({"targets": ("sm86", "sm120")}, "was built for sm86, sm120, the GPU is sm89"),
        ({"plugins": "twins"}, "has dlo plugins, and no plugin library is given"),
        ({"plugins": "library"}, "has dlo plugins, and no plugin library is given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_engine_may_not_run_when_record_and_machine_differ(
    engine: EngineRecord, change: dict[str, Any], why: str
) -> None:
    (reason,) = reasons(changed_build(engine, **change))
    assert why in reason
    assert reason.startswith("model.engine: ")


def test_portable_engine_runs_from_ampere_on(engine: EngineRecord) -> None:
    portable = changed_build(engine, targets=())
    assert reasons(portable, "sm120") == []
    assert reasons(portable, "sm75") == ["model.engine: is portable from sm80 on, the GPU is sm75"]


def test_engine_carries_its_kernels_when_its_plugins_were_deployed_quickly(engine: EngineRecord) -> None:
    assert reasons(changed_build(engine, plugins="quick-deploy")) == []


def test_plugin_library_must_be_the_one_built_with(engine: EngineRecord, tmp_path: Path) -> None:
    library = tmp_path / "libdlo_plugins.so"
    engine = changed_build(engine, plugins="library", plugin_library_sha256="0" * 64)
    assert "does not exist" in reasons(engine, library=library)[0]
    library.write_bytes(b"library")
    assert "it was built with 000000000000…" in reasons(engine, library=library)[0]
    assert reasons(changed_build(engine, plugin_library_sha256=file_sha256(library)), library=library) == []
    twins = changed_build(engine, plugins="twins", plugin_library_sha256=None)
    assert reasons(twins, library=library) == [], "whichever has the kernels"


def test_all_engines_and_reasons_are_named_when_several_are_wrong(engine: EngineRecord) -> None:
    other = dataclasses.replace(engine, file=engine.file.with_name("decode.engine"))
    with pytest.raises(ModelLoadError) as info:
        require_runnable([changed_build(engine, plugins="twins"), changed_build(other, targets=("sm86",))], "sm89")
    assert "model.engine: has dlo plugins" in str(info.value)
    assert "decode.engine: was built for sm86" in str(info.value)
    assert "--trt-plugin-library" in str(info.value)
    assert "--trt-target sm89" in str(info.value)
    assert info.value.exit_code == 2


def test_machine_is_at_fault_when_the_backend_has_another_version(engine: EngineRecord) -> None:
    with pytest.raises(BackendUnavailableError, match=r"hint: pip install tensorrt-rtx==1\.0\.0, or export") as info:
        require_runnable([changed_build(engine, version="1.0.0", targets=("sm120",))], "sm89")
    assert info.value.exit_code == 4
    assert "was built for sm120" in str(info.value)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="enterprise TensorRT is installed")
def test_machine_is_at_fault_when_the_backend_is_not_installed(engine: EngineRecord) -> None:
    with pytest.raises(BackendUnavailableError, match=r"needs TensorRT 11\.4\.0, which is not installed"):
        require_runnable([changed_build(engine, backend="tensorrt", version="11.4.0")], None)
