"""dlo_artifact.json is written and read by the same code, and whatever is wrong with one is named."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dlo_export.runtimes.artefact.description import (
    FILE_NAME,
    ArtefactDescription,
    load_description,
    mean_active_rates,
    save_description,
    verify_description,
)
from dlo_export.runtimes.artefact.files import verify_files
from dlo_export.runtimes.artefact.name_ranges import collapse, expand
from dlo_export.runtimes.artefact.typed_json import from_json, to_json
from dlo_export.runtimes.errors import ModelLoadError
from tests.runtimes.engine_records import changed_build, description, record, save_artefact
from tests.runtimes.static_cache_graphs import LAYERS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_artefact(tmp_path, record(tmp_path))


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    values = json.loads((folder / FILE_NAME).read_text())
    change(values)
    (folder / FILE_NAME).write_text(json.dumps(values))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as info:
        load_description(folder)
    assert info.value.exit_code == 2
    assert "\n\nhint: " in str(info.value)
    return str(info.value)


def test_description_is_read_as_it_was_written(tmp_path: Path) -> None:
    engines = record(tmp_path, "prefill"), changed_build(record(tmp_path, "decode"), plugins="twins", targets=())
    save_artefact(tmp_path, *engines)
    read = load_description(tmp_path)
    assert read == description(*engines)
    before = (tmp_path / FILE_NAME).read_bytes()
    save_description(read, tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_description_is_read_wherever_the_artefact_is_moved(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("elsewhere") / "artefact"
    folder.rename(place)
    assert load_description(place).engines[0].file == place / "engines/model.engine"


def test_cache_tensors_are_one_entry_in_the_file(folder: Path) -> None:
    values = json.loads((folder / FILE_NAME).read_text())
    cache = f"past_key_values.{{0..{LAYERS - 1}}}.key|value"
    assert [value["name"] for value in values["interface"]["inputs"]][-1] == cache
    assert values["format_version"] == next(iter(values.values())), "what to expect of the rest comes first"


@pytest.mark.parametrize(
    "names",
    [
        ["input_ids", "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key"],
        ["past_key_values.3.key", "past_key_values.3.value", "past_key_values.4.key", "past_key_values.4.value"],
        ["past_key_values.0.value", "past_key_values.0.key", "present.0.key", "present.0.value", "present.2.key"],
        ["past_active.0", "past_active.2", "past_active.3", "past_active.4", "present_active.0", "present_active.1"],
        [],
    ],
)
def test_ranges_of_names_expand_to_the_same_names_in_order(names: list[str]) -> None:
    entries = [(name, [1]) for name in names]
    assert expand(collapse(entries)) == entries
    assert len(collapse(entries)) <= len(entries)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("past_key_values.{0..99999}.key|value", "expected a range of at most"),
        ("past_key_values.{3..1}.key|value", "expected a range of at most"),
        ("hidden.{0..1}", "expected past_key_values.{a..b}.key|value"),
        ("past_key_values.{0..1}.key|value", "names past_key_values.0.key twice"),
    ],
)
def test_ranges_of_names_are_refused_when_they_are_none(folder: Path, name: str, problem: str) -> None:
    entry = {"name": name, "dtype": "float", "shape": []}
    edit(folder, lambda values: values["interface"]["inputs"].append(entry))
    assert "interface.inputs" in refusal(folder)
    assert problem in refusal(folder)


@pytest.mark.parametrize("version", [1, 4, 6, "5", None, True, 2.5])
def test_description_is_refused_when_it_has_another_format(folder: Path, version: object) -> None:
    edit(folder, lambda values: values.update(format_version=version))
    assert "this version reads 5" in refusal(folder)
    assert "hint: export the model again, or use the dlo-export that wrote it" in refusal(folder)


def test_all_problems_are_named_by_their_fields_when_fields_are_wrong(folder: Path) -> None:
    def change(values: Any) -> None:
        values["dtype"] = "int4"
        values["layers"][1]["routed"] = "yes"
        values["routing"]["scale_factor"] = float("nan")
        del values["source"]["sha256"]
        engine = values["engines"][0]
        engine["build"]["sha256"] = "0" * 63 + "X"
        engine["build"]["backend"] = "onnx"
        engine["build"]["stages"][0]["peak_bytes"] = 2**70
        engine["profiles"][0]["shapes"]["input_ids"] = [[1, 1], [1, 1]]
        engine["graph"] = "/etc/passwd"
        engine["max_batch"] = 0

    edit(folder, change)
    text = refusal(folder)
    for problem in (
        "dtype is 'int4', expected one of fp32, fp16, bf16",
        "layers[1].routed is 'yes', expected true or false",
        "routing.scale_factor is nan, expected a number",
        "source.sha256 is missing",
        "engines[0].build.sha256 is '0000",
        "engines[0].build.backend is 'onnx', expected one of rtx, tensorrt",
        "engines[0].build.stages[0].peak_bytes is 1180591620717411303424, expected a whole number",
        "engines[0].profiles[0].shapes.input_ids has 2 entries, expected 3",
        "engines[0].graph is '/etc/passwd', expected a file inside the folder",
        "engines[0].max_batch is 0, expected 1 or more",
    ):
        assert problem in text


def test_fields_are_named_when_they_contradict_each_other(folder: Path) -> None:
    def change(values: Any) -> None:
        values["layers"][0]["routed"] = False
        values["engines"][0]["lowering"] = "none"
        values["files"].pop()

    edit(folder, change)
    text = refusal(folder)
    assert "routing.layers are [0, 1], but layers are marked as routed: [1]" in text
    assert "engines[0].lowering is none, but routing is not null" in text
    assert "engines[0].graph is model.onnx, which files does not list" in text


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from _places(item, (*place, key))


@pytest.mark.parametrize("hostile", [None, [], "x", -1, 1e400, {"a": [[[]]]}, "\ud800\0"], ids=repr)
def test_description_is_read_or_refused_whatever_a_field_holds(folder: Path, hostile: object) -> None:
    """Every field in turn; nothing but the refusal may come out."""
    values = json.loads((folder / FILE_NAME).read_text())
    refused = 0
    for *parents, last in _places(values):
        changed = copy.deepcopy(values)
        holder = changed
        for key in parents:
            holder = holder[key]
        holder[last] = hostile
        (folder / FILE_NAME).write_text(json.dumps(changed))
        try:
            load_description(folder)
        except ModelLoadError:
            refused += 1
        else:
            if changed != values:
                with pytest.raises(ModelLoadError, match="was changed since it was written"):
                    verify_description(folder)
    assert refused > 100


def test_description_is_refused_when_a_field_is_missing(folder: Path) -> None:
    values = json.loads((folder / FILE_NAME).read_text())
    names = {field.name for field in dataclasses.fields(ArtefactDescription)}
    assert [*values][-1] == "content_sha256", "which verify_description asks for"
    assert names | {"content_sha256"} == values.keys()
    for name in names - {"format_version"}:
        (folder / FILE_NAME).write_text(json.dumps({key: value for key, value in values.items() if key != name}))
        assert f"{FILE_NAME}: {name} is missing" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"format_version": 1e9999}', b""])
def test_description_is_refused_when_it_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / FILE_NAME).write_bytes(content)
    with pytest.raises(ModelLoadError):
        load_description(folder)


def test_fields_of_later_versions_are_left_out(folder: Path) -> None:
    edit(folder, lambda values: values["engines"][0].update(invented=1))
    assert load_description(folder) == description(record(folder))


def test_files_are_named_when_they_were_changed(folder: Path) -> None:
    files = load_description(folder).files
    verify_files(files)
    (folder / "engines/model.engine").write_bytes(b"no enginE")
    (folder / "engines/model.onnx").write_bytes(b"longer than before")
    with pytest.raises(ModelLoadError) as info:
        verify_files(files)
    assert f"{folder}/engines/model.engine: was changed: its sha256 is" in str(info.value)
    assert f"{folder}/engines/model.onnx: was changed: it has 18 bytes, expected 9" in str(info.value)


def test_active_rates_are_means_over_original_and_injected_layers() -> None:
    assert mean_active_rates(description(), {0: 0.25, 1: 0.5}) == {"original": 0.25, "injected": 0.5}
    assert mean_active_rates(dataclasses.replace(description(), layers=()), {}) == {"original": None, "injected": None}


def test_json_of_a_dataclass_is_that_of_its_annotations(tmp_path: Path) -> None:
    engine = record(tmp_path)
    values = to_json(engine, tmp_path)
    assert values["file"] == "engines/model.engine"
    assert values["build"]["census"]["skipping"] == {"0": {"TOPK": 1}, "1": {"TOPK": 1}}
    assert from_json(type(engine), json.loads(json.dumps(values)), tmp_path) == engine
