"""An artefact that is not, or no longer, what its description says is refused by `dlo inspect` and `dlo parity`."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.commands import run
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.runtimes.artefact.description import FILE_NAME, load_description
from dlo_export.runtimes.errors import ModelLoadError
from tests.exporter.forked_commands import run as dlo
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


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact whose parity ran."""
    folder = tmp_path_factory.mktemp("proven")
    model = save_tiny_llama(folder / "model", **SIZES)
    return export_model(ExportRequest(str(model), folder / "artefact"), Reporter()).folder


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


def _mark_as_identity(values: Any) -> None:
    values["layers"][0]["identity"] = True


def _scale_otherwise(values: Any) -> None:
    values["routing"]["scale_factor"] = 3.0


def _round_otherwise(values: Any) -> None:
    values["routing"]["scale_gap"] = 0.05000000000000001


def _rename_source(values: Any) -> None:
    values["source"]["name"] = "llama"


def _swap_source_hash(values: Any) -> None:
    values["source"]["sha256"] = "0" * 64


def _claim_parity(values: Any) -> None:
    values["parity"] = {"verdict": "PASS", "reason": None}


def _enlarge_engine(values: Any) -> None:
    values["engines"][0]["max_batch"] = 64


def _add_field(values: Any) -> None:
    values["note"] = "checked by hand"


def _drop_hash(values: Any) -> None:
    del values["content_sha256"]


def _hash_of_another_kind(values: Any) -> None:
    values["content_sha256"] = ["\x1b[2J"]


NO_FILE_TELLS = [
    *(_mark_as_identity, _scale_otherwise, _round_otherwise, _rename_source, _swap_source_hash, _claim_parity),
    *(_enlarge_engine, _add_field, _drop_hash, _hash_of_another_kind),
]


@pytest.mark.parametrize("change", NO_FILE_TELLS, ids=lambda change: change.__name__.strip("_"))
def test_description_is_refused_when_a_field_was_changed_that_no_file_tells(
    artefact: Path, change: Callable[[Any], None]
) -> None:
    values = json.loads((artefact / FILE_NAME).read_text())
    change(values)
    (artefact / FILE_NAME).write_text(json.dumps(values))
    assert load_description(artefact), "it is readable"
    with pytest.raises(ModelLoadError, match=r"dlo_artifact\.json: was changed since it was written: content_sha256"):
        open_description(artefact)


def test_description_is_opened_when_only_its_layout_was_changed(artefact: Path) -> None:
    values = json.loads((artefact / FILE_NAME).read_text())
    (artefact / FILE_NAME).write_text(json.dumps(dict(reversed(values.items())), ensure_ascii=False))
    assert open_description(artefact) == load_description(artefact)


def test_parity_verdict_is_refused_when_the_report_says_another(proven: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(proven, tmp_path / "artefact")
    report = folder / "parity.json"
    report.write_text(report.read_text().replace('"verdict": "PASS"', '"verdict": "FAIL"'))
    with pytest.raises(ModelLoadError, match=r"parity\.verdict is PASS, parity\.json says 'FAIL'"):
        open_description(folder)
    report.write_text("[]")
    with pytest.raises(ModelLoadError, match=r"parity\.json: holds a JSON list"):
        open_description(folder)


def test_inspect_shows_both_verdicts_and_that_the_report_was_removed(proven: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(proven, tmp_path / "artefact")
    for said in ("PASS", "not there"):
        result = dlo("inspect", folder)
        assert result.returncode == DONE, result.stderr
        assert f"parity PASS (parity.json: {said})" in " ".join(result.stdout.split())
        (folder / "parity.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("command", ["run", "bench"])
def test_commands_name_the_file_when_a_copy_was_cut_short(
    artefact: Path, tmp_path: Path, command: str, name: str
) -> None:
    with (artefact / name).open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(size - 1)
    given = {"run": ["hello", "-n", "1"], "bench": ["--rounds", "1", "--prompt-tokens", "4", "--decode-tokens", "1"]}
    result = dlo(command, artefact, *given[command])
    assert result.returncode == BAD_INPUT, result.stderr
    assert f"{name}: was changed: it has {size - 1} bytes, expected {size}\n\nhint: copy" in result.stderr


def test_run_says_that_weights_were_left_out_when_they_were(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", **SIZES, routed=(True, False), tokenizer=True, vocab=BYTE_VOCABULARY)
    export_model(ExportRequest(str(model), tmp_path / "artefact", weights=False), Reporter())
    result = dlo("run", tmp_path / "artefact", "hello")
    assert result.returncode == BAD_INPUT, result.stderr
    assert "has no weights, model.onnx.data was left out" in result.stderr
    assert "without --no-weights" in result.stderr
    result = dlo("parity", tmp_path / "artefact", model)
    assert result.returncode == BAD_INPUT, result.stderr
    assert "has no weights, model.onnx.data was left out" in result.stderr
    assert dlo("inspect", tmp_path / "artefact").returncode == DONE


def _list_opened(artefact: Path, verify: bool, listed: Path) -> None:
    """Runs an artefact and lists what Python opened meanwhile; in a process of its own, because hooks stay."""
    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    run.main(artefact, "hello", max_new_tokens=1, verify=verify)
    listed.write_text("\n".join(opened))


@pytest.mark.parametrize("verify", [False, True])
def test_run_opens_the_weights_to_hash_them_only_when_asked_to(released: Path, tmp_path: Path, verify: bool) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=_list_opened, args=(released, verify, tmp_path / "listed")
    )
    process.start()
    process.join()
    # ONNX Runtime maps the weights without Python's help; what Python opens, it reads.
    opened = [Path(name) for name in (tmp_path / "listed").read_text().splitlines()]
    assert released / FILE_NAME in opened
    assert (released / "model.onnx.data" in opened) is verify


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
