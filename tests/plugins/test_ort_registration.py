"""What is said of a library that cannot be libdlo_ort.so, and what is exported without one."""

import json
import shutil
import subprocess
import sys

import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from dlo_export.exporter.app import app
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.graph_passes.spec.ops import VERSION
from dlo_export.plugins.errors import PluginError, PluginLibraryError
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE
from dlo_export.plugins.ort_registration import register_library
from dlo_export.plugins.registration import load_library
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("checkpoint") / "model", routed=[True, False, True])


@pytest.fixture(scope="module")
def artefact(checkpoint, tmp_path_factory):
    return export_model(
        ExportRequest(str(checkpoint), tmp_path_factory.mktemp("artefact") / "out", lowering="plugin"), Reporter()
    )


def compiled(folder, source):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is here")
    (folder / "library.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "other.so", folder / "library.c"], check=True)
    return folder / "other.so"


def refusal(path):
    with pytest.raises(PluginLibraryError) as error:
        register_library(ort.SessionOptions(), path)
    assert error.value.exit_code == 4
    assert "ORT_INCLUDE=" in error.value.hint
    return error.value.message


def test_library_is_refused_when_there_is_none(tmp_path):
    assert refusal(tmp_path / "missing.so").endswith("no such file; expected libdlo_ort.so")
    assert refusal(tmp_path).endswith("is a folder; expected libdlo_ort.so")


def test_library_is_refused_when_it_does_not_load(tmp_path):
    path = tmp_path / "text.so"
    path.write_text("no library")
    assert f"plugin library {path}: does not load here" in refusal(path)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6])
def test_library_is_refused_when_it_was_half_copied(tmp_path, kept):
    """The system would map it, and end the process where it reads what is not there."""
    whole = compiled(tmp_path, f"int dlo_operator_version(void) {{ return {VERSION}; }}\nint numbers[9999] = {{1}};")
    content = whole.read_bytes()
    path = tmp_path / "half.so"
    path.write_bytes(content[: int(len(content) * kept)])
    assert refusal(path).endswith("half.so: is cut short")
    with pytest.raises(PluginError, match="is cut short"):
        load_library(None, path)  # TensorRT is not asked


def test_library_is_refused_when_it_is_another_one(tmp_path):
    assert refusal(compiled(tmp_path, "int other;")).endswith("is not libdlo_ort.so")


def test_library_is_refused_when_its_operators_have_another_version(tmp_path):
    path = compiled(tmp_path, f"int dlo_operator_version(void) {{ return {VERSION + 1}; }}")
    assert refusal(path).endswith(f"has version {VERSION + 1} of the dlo operators; expected {VERSION}")


def test_library_is_refused_when_onnxruntime_does(tmp_path):
    path = compiled(tmp_path, f"int dlo_operator_version(void) {{ return {VERSION}; }}")
    assert f"plugin library {path}: ONNX Runtime refuses it" in refusal(path)


def test_plugin_lowering_is_exported_with_parity_not_run_when_there_is_no_library(artefact):
    assert artefact.description.lowering == "plugin"
    assert artefact.description.plugin_operators == ("dlo::SkipDown", "dlo::SkipGateUp")
    assert artefact.description.parity.verdict == "NOT RUN"
    assert "libdlo_ort.so" in artefact.description.parity.reason
    assert open_description(artefact.folder) == artefact.description
    with pytest.raises(PluginLibraryError, match="none is given"):
        open_artefact(artefact.folder)


def test_parity_ends_with_4_when_there_is_no_library(artefact, checkpoint, monkeypatch):
    monkeypatch.delenv(ORT_LIBRARY_VARIABLE, raising=False)
    result = CliRunner().invoke(app, ["parity", str(artefact.folder), str(checkpoint)])
    assert isinstance(result.exception, PluginLibraryError)
    assert result.exception.message.endswith("libdlo_ort.so alone, and none is given")


def test_genai_config_names_the_library_when_the_graph_has_its_operators(artefact):
    settings = json.loads((artefact.folder / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["session_options"]["custom_ops_library"] == "libdlo_ort.so"
    # In a process of its own: the system loads a library by its bare name where this one has it from elsewhere.
    program = "import sys, onnxruntime_genai; onnxruntime_genai.Model(sys.argv[1])"
    ended = subprocess.run(
        [sys.executable, "-c", program, artefact.folder], capture_output=True, text=True, check=False
    )
    assert ended.returncode
    assert "Failed to load library libdlo_ort.so" in ended.stderr


def test_export_ends_with_4_before_any_work_when_the_library_is_missing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv(ORT_LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    command = ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--lowering", "plugin"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, PluginLibraryError)
    assert list(tmp_path.iterdir()) == []


def test_library_is_not_looked_at_when_nothing_needs_it(checkpoint, tmp_path):
    library = tmp_path / "missing.so"
    result = export_model(
        ExportRequest(str(checkpoint), tmp_path / "out", parity=False, ort_plugin_library=library), Reporter()
    )
    assert result.description.lowering == "compact"
    open_artefact(result.folder, plugin_library=library).close()
