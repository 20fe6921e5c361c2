"""An artefact that is not, or no longer, what its description says is refused by `dlo inspect` and `dlo parity`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.runtimes.artefact.description import FILE_NAME
from dlo_export.runtimes.errors import ModelLoadError
from tests.exporter.test_cli import dlo
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

SIZES = {"layers": 2, "hidden": 16, "intermediate": 24, "heads": 2, "kv_heads": 1}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with an engine; the model it was made from lies beside it."""
    folder = tmp_path_factory.mktemp("released")
    model = save_tiny_llama(folder / "model", **SIZES, routed=(True, False), tokenizer=True, vocab=BYTE_VOCABULARY)
    trt = TensorRtRequest("rtx", ("sm89",), max_batch=1, max_sequence=8, max_cache=16)
    export_model(ExportRequest(str(model), folder / "artefact", parity=False, trt=trt), Reporter())
    return folder / "artefact"


@pytest.fixture
def artefact(released: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(released, tmp_path / "artefact")


def flip_byte(file: Path, position: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def test_description_is_opened_when_nothing_was_changed(artefact: Path) -> None:
    description = open_description(artefact)
    assert {file.name.relative_to(artefact).as_posix() for file in description.files} == {
        "model.onnx",
        "model.onnx.data",
        "engines/model.engine",
        "engines/model.onnx",
        "engines/model.onnx.data",
    }
    assert description.engines[0].capture_problem is not None
    assert description.plugin_operators == ()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "engines/model.onnx", "engines/model.engine"])
def test_file_is_named_when_a_byte_of_it_was_flipped(artefact: Path, name: str) -> None:
    flip_byte(artefact / name)
    with pytest.raises(ModelLoadError, match=rf"artefact/{name}: was changed: its sha256 is") as info:
        open_description(artefact)
    assert info.value.exit_code == BAD_INPUT


def _set_dtype(values: Any) -> None:
    values["dtype"] = "fp16"


def _drop_layer(values: Any) -> None:
    values["layers"].pop()


def _move_router(values: Any) -> None:
    values["routing"]["layers"] = [1]
    for layer in values["layers"]:
        layer["routed"] = layer["index"] == 1


def _rename_lowering(values: Any) -> None:
    values["lowering"] = "if"


def _rename_input(values: Any) -> None:
    values["interface"]["inputs"][0]["name"] = "tokens"


def _rename_engine_lowering(values: Any) -> None:
    values["engines"][0]["lowering"] = "plugin"


def _set_engine_dtype(values: Any) -> None:
    values["engines"][0]["dtype"] = "fp16"


def _mark_as_injected(values: Any) -> None:
    values["layers"][0]["injected"] = True


def _vouch_for_engines_alone(values: Any) -> None:
    values["files"] = [
        file for file in values["files"] if file["name"] in ("engines/model.onnx", "engines/model.engine")
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_mark_as_injected, "layers are marked as injected: 0, model.onnx has none"),
        (_vouch_for_engines_alone, "files does not list engines/model.onnx.data\n  files does not list model.onnx\n"),
        (_vouch_for_engines_alone, "files does not list model.onnx.data"),
        (_set_dtype, "dtype is fp16, most weights of model.onnx are fp32"),
        (_drop_layer, "layers has 1 entries, model.onnx has 2 decoder layers"),
        (_move_router, "routing.layers are [1], model.onnx routes [0]"),
        (_rename_lowering, "lowering is if, model.onnx has compact"),
        (_rename_input, "interface.inputs are not those of model.onnx: input_ids differs"),
        (_rename_engine_lowering, "engines[0].lowering is plugin, model.onnx has compact"),
        (_set_engine_dtype, "engines[0].dtype is fp16, most weights of model.onnx are bf16"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_field_is_named_when_the_graph_contradicts_it(
    artefact: Path, change: Callable[[Any], None], problem: str
) -> None:
    values = json.loads((artefact / FILE_NAME).read_text())
    change(values)
    (artefact / FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(ModelLoadError) as info:
        open_description(artefact)
    assert problem in str(info.value)


def test_commands_refuse_a_changed_artefact(artefact: Path, released: Path) -> None:
    flip_byte(artefact / "model.onnx.data", 0.9)
    model = released.parent / "model"
    commands = [
        ("inspect", artefact),
        ("parity", artefact, model),
        ("run", artefact, "hello", "-n", "1", "--verify"),
        ("bench", artefact, "--rounds", "1", "--prompt-tokens", "4", "--decode-tokens", "1", "--verify"),
    ]
    for command in commands:
        result = dlo(*command)
        assert result.returncode == BAD_INPUT, result.stderr
        assert "model.onnx.data: was changed" in result.stderr
        assert "hint: " in result.stderr


def test_run_and_inspect_accept_a_released_artefact(released: Path) -> None:
    assert dlo("run", released, "hello", "-n", "1", "--verify").returncode == DONE
    result = dlo("inspect", released, "--json")
    assert result.returncode == DONE, result.stderr
    found = json.loads(result.stdout)
    assert found["description"] == json.loads((released / FILE_NAME).read_text())


def test_inspect_takes_a_graph_of_engines_as_any_graph(released: Path) -> None:
    result = dlo("inspect", released / "engines/model.onnx", "--json")
    assert result.returncode == DONE, result.stderr
    assert json.loads(result.stdout)["description"] is None
