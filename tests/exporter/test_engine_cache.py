"""An engine is built once per content, and what is wrong with a stored or an exported one is said."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from rich.console import Console

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.engine_cache import VARIABLE, EngineCache, cache_folder, cache_limit
from dlo_export.exporter.tensorrt.engine_fingerprint import fingerprint
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.tensorrt.engines import build_engine
from tests.exporter.tiny_engines import save_request


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine from a graph with a data file, built once, and the cache that keeps it."""
    folder = tmp_path_factory.mktemp("built")
    asked = save_request(folder, use_cache=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder / "cache"))
        build = build_engine(asked, Reporter())
    return asked, build


@pytest.fixture
def place(built, tmp_path, monkeypatch):
    """The same in a folder of its own, cache included: request, build, folder."""
    asked, build = built
    shutil.copytree(asked.graph.parent, tmp_path / "work")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "work" / "cache"))
    moved = {"graph": tmp_path / "work" / "model.onnx", "output": tmp_path / "work" / "engines" / "model.engine"}
    asked = dataclasses.replace(asked, **moved)
    return asked, build, tmp_path / "work"


@pytest.fixture
def reporter():
    made = Reporter()
    made.console = Console(file=io.StringIO(), width=1000)
    return made


def said(reporter):
    return reporter.console.file.getvalue()


def test_build_engine_copies_from_cache_when_content_is_the_same(place, reporter):
    asked, build, _ = place
    asked.output.unlink()
    again = build_engine(asked, reporter)
    assert again == dataclasses.replace(build, from_cache=True)
    entry = cache_folder() / "engines" / build.cache_key / "model.engine"
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
    asked, build, _ = place
    assert fingerprint(asked).key == build.cache_key
    assert fingerprint(dataclasses.replace(asked, **change)).key != build.cache_key


def test_fingerprint_differs_when_weights_do(place):
    asked, build, folder = place
    data = folder / "model.onnx.data"
    values = np.fromfile(data, np.uint8)
    values[-1] ^= 1
    values.tofile(data)
    found = fingerprint(asked)
    assert found.key != build.cache_key


def test_fingerprint_differs_when_graph_does(place):
    asked, build, _ = place
    model = onnx.load(asked.graph, load_external_data=False)
    model.graph.doc_string = "another"
    onnx.save(model, asked.graph)
    assert fingerprint(asked).key != build.cache_key


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
        (lambda entry: (entry / "engine.json").write_text("{}"), "backend is missing"),
        (lambda entry: (entry / "engine.json").unlink(), "cannot be read as JSON"),
        (lambda entry: (entry / "model.engine").unlink(), "No such file"),
    ],
    ids=["engine", "json", "fields", "no-record", "no-engine"],
)
def test_build_engine_says_so_and_builds_again_when_cache_entry_is_damaged(place, reporter, damage, why):
    asked, build, folder = place
    damage(folder / "cache" / "engines" / build.cache_key)
    asked.output.unlink()
    again = build_engine(asked, reporter)
    assert not again.from_cache
    assert "warning: engine cache: removed a damaged entry, building again: " in said(reporter)
    assert why in said(reporter)
    assert build_engine(asked, reporter).from_cache


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_engine_cache_counts_an_entry_as_damaged_when_its_engine_is_no_file(place, make):
    asked, build, folder = place
    engine = folder / "cache" / "engines" / build.cache_key / "model.engine"
    engine.unlink()
    make(engine)
    told = []
    asked.output.unlink()
    assert EngineCache(folder / "cache", told.append).fetch(build.cache_key, asked.output) is None
    assert "removed a damaged entry" in told[0]
    assert not asked.output.exists()


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
    build = build_engine(asked, reporter)
    assert asked.output.stat().st_size == build.bytes
    assert "was not kept: Not a directory" in said(reporter)


def test_engine_cache_drops_what_was_unused_for_longest_when_it_is_full(place, monkeypatch):
    asked, build, folder = place
    cache = EngineCache(folder / "other", print)
    keys = [digit * 64 for digit in "abc"]
    monkeypatch.setenv("DLO_EXPORT_CACHE_GB", str(2.5 * build.bytes / 2**30))
    for age, key in enumerate(keys[:2]):
        cache.store(dataclasses.replace(build, cache_key=key), asked.output)
        os.utime(cache.folder / key, (age, age))
    assert cache.fetch(keys[0], folder / "copy.engine") is not None  # used just now
    cache.store(dataclasses.replace(build, cache_key=keys[2]), asked.output)
    assert sorted(entry.name for entry in cache.folder.iterdir()) == [keys[0], keys[2]]


def test_there_is_no_cache_when_nothing_tells_the_users_home():
    """A container's user: no HOME, no line in /etc/passwd."""
    code = (
        "import os; from dlo_export.exporter.tensorrt.engine_cache import cache_folder; "
        "os.setuid(54321); print(cache_folder())"
    )
    if os.getuid() != 0:
        pytest.skip("only root can become a user that nobody knows")
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME", VARIABLE)}
    result = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=False)
    assert result.stdout == "None\n", result.stderr


@pytest.mark.parametrize("given", ["lots", "nan", "-1", "inf", "1,5", "0x10"])
def test_cache_limit_is_refused_by_name_when_it_is_no_number(monkeypatch, given):
    monkeypatch.setenv("DLO_EXPORT_CACHE_GB", given)
    with pytest.raises(InputError, match=r"DLO_EXPORT_CACHE_GB is '.*', expected[\s\S]*hint: "):
        cache_limit()


def test_cache_limit_is_in_gigabytes_when_it_is_set(monkeypatch):
    monkeypatch.setenv("DLO_EXPORT_CACHE_GB", "0.5")
    assert cache_limit() == 2**29
    monkeypatch.setenv("DLO_EXPORT_CACHE_GB", "")
    assert cache_limit() == 50 * 2**30


def test_cache_folder_is_the_users_when_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dlo-export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dlo-export"


def test_engine_request_survives_json(place):
    asked, _, folder = place
    asked = dataclasses.replace(asked, plugin_library=folder / "libdlo_plugins.so", timeout_s=3.5)
    assert EngineRequest.from_json(asked.to_json()) == asked


def test_engine_cache_leaves_what_is_not_its_own_when_it_is_full(place, monkeypatch):
    asked, build, folder = place
    cache = EngineCache(folder / "crowded", print)
    mine = folder / "mine"
    mine.mkdir()
    (mine / "model.engine").write_text("mine")
    cache.folder.mkdir(parents=True)
    (cache.folder / ("d" * 64)).symlink_to(mine)
    (cache.folder / ("e" * 64)).write_text("a file of this name")
    (cache.folder / "notes").mkdir()
    monkeypatch.setenv("DLO_EXPORT_CACHE_GB", "0")
    for key in ("a" * 64, "b" * 64):
        cache.store(dataclasses.replace(build, cache_key=key), asked.output)
    assert cache.fetch("d" * 64, folder / "copy.engine") is None
    assert (mine / "model.engine").read_text() == "mine"
    assert sorted(entry.name[:5] for entry in cache.folder.iterdir()) == ["bbbbb", "ddddd", "eeeee", "notes"]
