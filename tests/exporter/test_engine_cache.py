"""An engine is built once per content, and what is wrong with a stored or an exported one is said."""

import dataclasses
import io
import json
import os
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dlo_export.exporter.tensorrt.engine_check import check_engine, explain_engine
from rich.console import Console

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.engine_cache import VARIABLE, EngineCache, cache_folder
from dlo_export.exporter.tensorrt.engine_fingerprint import fingerprint
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.tensorrt.engines import build_engine
from dlo_export.exporter.weight_file import save_weights
from tests.exporter.engine_graphs import Tiny, request


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine from a graph with a data file, built once, and the cache that keeps it."""
    folder = tmp_path_factory.mktemp("built")
    asked = dataclasses.replace(request(folder, Tiny("compact", layers=1)), use_cache=True)
    model = ir.load(asked.graph)
    save_weights(model, folder / "model.onnx.data")
    ir.save(model, asked.graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder / "cache"))
        record = build_engine(asked, Reporter())
    return asked, record


@pytest.fixture
def place(built, tmp_path, monkeypatch):
    """The same in a folder of its own, cache included: request, record, folder."""
    asked, record = built
    shutil.copytree(asked.graph.parent, tmp_path / "work")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "work" / "cache"))
    moved = {"graph": tmp_path / "work" / "model.onnx", "output": tmp_path / "work" / "engines" / "model.engine"}
    asked = dataclasses.replace(asked, **moved)
    return asked, dataclasses.replace(record, file=asked.output, graph=asked.graph), tmp_path / "work"


@pytest.fixture
def reporter():
    made = Reporter()
    made.console = Console(file=io.StringIO(), width=1000)
    return made


def said(reporter):
    return reporter.console.file.getvalue()


def test_build_engine_copies_from_cache_when_content_is_the_same(place, reporter):
    asked, record, _ = place
    asked.output.unlink()
    again = build_engine(asked, reporter)
    assert again == dataclasses.replace(record, from_cache=True)
    assert explain_engine(again) == []
    entry = cache_folder() / "engines" / record.cache_key / "model.engine"
    assert not entry.samefile(asked.output), "a copy, so that changing one leaves the other"
    assert said(reporter) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"targets": ("sm120",)},
        {"targets": ()},
        {"profiles": ()},
        {"dtype": "fp16"},
        {"lowering": "masked"},
        {"routed_layers": ()},
        {"expected_dtypes": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_differs_when_a_setting_does(place, change):
    asked, record, _ = place
    assert fingerprint(asked).key == record.cache_key
    assert fingerprint(dataclasses.replace(asked, **change)).key != record.cache_key


def test_fingerprint_differs_when_weights_do(place):
    asked, record, folder = place
    data = folder / "model.onnx.data"
    values = np.fromfile(data, np.uint8)
    values[-1] ^= 1
    values.tofile(data)
    found = fingerprint(asked)
    assert found.graph_sha256 == record.graph_sha256
    assert found.key != record.cache_key


def test_fingerprint_differs_when_graph_does(place):
    asked, record, _ = place
    model = onnx.load(asked.graph, load_external_data=False)
    model.graph.doc_string = "another"
    onnx.save(model, asked.graph)
    assert fingerprint(asked).key != record.cache_key


def test_fingerprint_differs_when_plugin_library_does(place):
    asked, _, folder = place
    keys = set()
    for content in (b"one", b"another"):
        library = folder / f"{len(content)}.so"
        library.write_bytes(content)
        keys.add(fingerprint(dataclasses.replace(asked, plugin_library=library)).key)
    assert len(keys | {fingerprint(asked).key}) == 3


def test_fingerprint_refuses_when_a_data_file_lies_elsewhere(place):
    asked, _, folder = place
    model = onnx.load(asked.graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    onnx.save(model, asked.graph)
    shutil.copy(folder / "model.onnx.data", folder.parent)
    with pytest.raises(InputError, match="outside of its folder"):
        fingerprint(asked)


def damage_engine(entry):
    engine = entry / "model.engine"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_engine, "its sha256 is"),
        (lambda entry: (entry / "engine.json").write_text("{"), "cannot be read as JSON"),
        (lambda entry: (entry / "engine.json").write_text("{}"), "backend"),
        (lambda entry: (entry / "engine.json").unlink(), "cannot be read as JSON"),
        (lambda entry: (entry / "model.engine").unlink(), "No such file"),
    ],
    ids=["engine", "json", "fields", "no-record", "no-engine"],
)
def test_build_engine_says_so_and_builds_again_when_cache_entry_is_damaged(place, reporter, damage, why):
    asked, record, folder = place
    damage(folder / "cache" / "engines" / record.cache_key)
    asked.output.unlink()
    again = build_engine(asked, reporter)
    assert not again.from_cache
    assert "warning: engine cache: removed a damaged entry, building again: " in said(reporter)
    assert why in said(reporter)
    assert build_engine(asked, reporter).from_cache


def test_build_engine_builds_when_cache_is_not_to_be_used(place, reporter, monkeypatch):
    asked, _, folder = place
    assert not build_engine(dataclasses.replace(asked, use_cache=False), reporter).from_cache
    monkeypatch.setenv(VARIABLE, "")
    assert not build_engine(asked, reporter).from_cache
    assert len(list((folder / "cache" / "engines").iterdir())) == 1


def test_build_engine_succeeds_and_says_so_when_cache_cannot_be_written(place, reporter, monkeypatch):
    asked, _, folder = place
    (folder / "file").touch()
    monkeypatch.setenv(VARIABLE, str(folder / "file"))
    record = build_engine(asked, reporter)
    assert record.file.stat().st_size == record.bytes
    assert "was not kept: Not a directory" in said(reporter)


def test_engine_cache_drops_what_was_unused_for_longest_when_it_is_full(place, monkeypatch):
    _, record, folder = place
    cache = EngineCache(folder / "other", print)
    keys = [digit * 64 for digit in "abc"]
    monkeypatch.setenv("DLO_EXPORT_CACHE_GB", str(2.5 * record.bytes / 2**30))
    for age, key in enumerate(keys[:2]):
        cache.store(dataclasses.replace(record, cache_key=key))
        os.utime(cache.folder / key, (age, age))
    assert cache.fetch(keys[0], folder / "copy.engine") is not None  # used just now
    cache.store(dataclasses.replace(record, cache_key=keys[2]))
    assert sorted(entry.name for entry in cache.folder.iterdir()) == [keys[0], keys[2]]


def test_cache_folder_is_the_users_when_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dlo-export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dlo-export"


def test_explain_engine_finds_nothing_when_engine_is_as_built(place):
    _, record, _ = place
    assert explain_engine(record) == []
    assert explain_engine(record, target="sm89") == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "1.0.0"}, "was built with TensorRT-RTX 1.0.0, installed is 1."),
        ({"backend": "tensorrt"}, " TensorRT 1.7.1.116"),
        ({"sha256": "0" * 64}, "it is not the engine that was built"),
        ({"bytes": 1}, "its record says 1: it is not the engine that was built"),
        ({"graph_sha256": "0" * 64}, "model.onnx changed since"),
        ({"weights_sha256": {"model.onnx.data": "0" * 64}}, "the weights model.onnx.data changed since"),
        ({"plugins": "twins"}, "no plugin library is given"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_explain_engine_says_why_when_record_and_machine_differ(place, change, why):
    _, record, _ = place
    (reason,) = explain_engine(dataclasses.replace(record, **change))
    assert why in reason
    assert reason.startswith("model.engine: ")


def test_explain_engine_says_why_when_gpu_is_another(place):
    _, record, _ = place
    assert explain_engine(record, target="sm120") == ["model.engine: was built for sm89, the GPU is sm120"]
    portable = dataclasses.replace(record, targets=())
    assert explain_engine(portable, target="sm120") == []
    assert explain_engine(portable, target="sm75") == ["model.engine: is portable from sm80 on, the GPU is sm75"]


def test_explain_engine_says_why_when_plugin_library_is_another(place):
    _, record, folder = place
    library = folder / "libdlo_plugins.so"
    record = dataclasses.replace(record, plugins="library", plugin_library_sha256="0" * 64)
    assert "does not exist" in explain_engine(record, library)[0]
    library.write_bytes(b"library")
    assert "libdlo_plugins.so changed since" in explain_engine(record, library)[0]
    assert explain_engine(dataclasses.replace(record, plugins="twins", plugin_library_sha256=None), library) == []


def test_explain_engine_lists_everything_when_several_things_are_wrong(place):
    asked, record, folder = place
    asked.output.unlink()
    (folder / "model.onnx.data").unlink()
    reasons = explain_engine(dataclasses.replace(record, version="1.0.0"))
    assert [("does not exist" in reason, "1.0.0" in reason) for reason in reasons] == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_check_engine_reads_the_artefact_when_it_has_engines(place):
    _, record, folder = place
    description = {"format_version": 1, "engines": [record.to_json(folder) | {"plugin_library": None}]}
    path = folder / "dlo_artifact.json"
    path.write_text(json.dumps(description))
    assert check_engine(folder) == []
    record.file.write_bytes(b"another")
    (reason,) = check_engine(folder)
    assert "it is not the engine that was built" in reason
    description["engines"] = [{"file": "engines/model.engine"}]
    path.write_text(json.dumps(description))
    assert "an engine's record cannot be read: KeyError: 'backend'" in check_engine(folder)[0]
    description["engines"] = []
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="has no engines"):
        check_engine(folder)


def test_engine_request_survives_json(place):
    asked, _, folder = place
    asked = dataclasses.replace(asked, plugin_library=folder / "libdlo_plugins.so", timeout_s=3.5)
    assert EngineRequest.from_json(asked.to_json()) == asked
