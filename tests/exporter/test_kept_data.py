"""Data files of somebody's graph that go on as they are, beside one of what is new."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.reflink import clone_file
from dlo_export.checkpoints.finite_weights import NonFiniteWeightError
from dlo_export.checkpoints.lazy_tensors import all_zeros
from dlo_export.exporter import kept_data
from dlo_export.exporter.app import app
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.graph_passes.weights.dense import dense_storage
from dlo_export.graph_passes.weights.storage import Place, StoredRows
from dlo_export.runtimes.artefact.description import load_description
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter
from tests.foreign_protos import Foreign, initializer, refer, reference_of
from tests.genai_graphs import save_genai_graph

WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return Foreign.saved(tmp_path_factory.mktemp("foreign"))


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _places(artefact):
    proto = onnx.load(artefact / "model.onnx", load_external_data=False)
    return {tensor.name: reference_of(tensor) for tensor in proto.graph.initializer if tensor.external_data}


def test_untouched_weights_stay_in_the_sources_file_and_what_is_new_is_written_beside_it(foreign, tmp_path):
    source = foreign.folder / "weights"
    artefact = foreign.export(foreign.folder / "model.onnx", tmp_path / "out", parity=True)
    assert (artefact / "weights").read_bytes() == source.read_bytes()
    description = load_description(artefact)
    assert description.parity.verdict == "PASS"
    (kept,) = description.kept_data
    assert kept.name == artefact / "weights"
    assert kept.how in ("copy", "reflink")
    entries = {file.name.name: file for file in description.files}
    assert entries["weights"].sha256 == _sha256(source)
    # The layers that were injected, and the routers: nothing of the source is written a second time.
    places, old = _places(artefact), _places(foreign.folder)
    stayed = {name: place for name, place in places.items() if place["location"] == "weights"}
    assert sorted((int(place["offset"]), int(place["length"])) for place in stayed.values()) == sorted(
        (int(place["offset"]), int(place["length"])) for place in old.values()
    )
    assert 0 < entries["model.onnx.data"].bytes < source.stat().st_size
    assert kept.unused_bytes == source.stat().st_size - sum(int(place["length"]) for place in stayed.values())
    foreign.check_logits(artefact)
    assert open_description(artefact) == description


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("model.onnx.data", True),
        ("model.onnx.data_1", True),
        ("data/of/weights.bin", True),
        ("Weights ü.data", True),
        ("config.json.data", True),
        # Names that mean something else to whoever opens the folder.
        ("engines/weights", False),
        ("dlo_added.data", False),
        ("tokenizer.model", False),
        ("MODEL.SAFETENSORS", False),
        (".hidden", False),
    ],
)
def test_data_file_keeps_its_name_when_that_means_nothing_else(foreign, tmp_path, name, kept):
    def rename(proto, folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "weights").rename(folder / name)
        for tensor in proto.graph.initializer:
            if tensor.external_data:
                refer(tensor, location=name)

    graph = foreign.changed(tmp_path / "model", rename)
    artefact = foreign.export(graph, tmp_path / "out")
    new = "dlo_added.data" if name.startswith("model.onnx.data") else "model.onnx.data"
    assert {place["location"] for place in _places(artefact).values()} == ({name, new} if kept else {new})
    assert len(load_description(artefact).kept_data) == kept
    open_description(artefact)
    foreign.check_logits(artefact)


def test_new_weights_are_split_beside_kept_files_when_a_size_is_asked_for(foreign, tmp_path):
    """A file for every weight: those up to the size stay, the embedding is written anew and stands alone."""

    def split(proto, folder):
        weights = (folder / "weights").read_bytes()
        for number, tensor in enumerate(each for each in proto.graph.initializer if each.external_data):
            place = reference_of(tensor)
            offset, length = int(place["offset"]), int(place["length"])
            (folder / f"weight_{number}").write_bytes(weights[offset : offset + length])
            refer(tensor, location=f"weight_{number}", offset="0")
        (folder / "weights").unlink()

    graph = foreign.changed(tmp_path / "model", split)
    sizes = {file.name: file.stat().st_size for file in graph.parent.glob("weight_*")}
    limit = max(size for size in sizes.values() if size < max(sizes.values()))
    artefact = foreign.export(graph, tmp_path / "out", weight_file_bytes=limit)
    description = open_description(artefact)
    kept = {file.name.name for file in description.kept_data}
    written = {file.name.name for file in description.files} - kept - {"model.onnx"}
    assert {"model.onnx.data", "model.onnx.data_1"} <= written
    assert kept
    assert all(sizes[name] <= limit for name in kept)
    locations = [place["location"] for place in _places(artefact).values()]
    assert set(locations) == kept | written
    alone = {name for name in written if locations.count(name) == 1}
    assert all((artefact / name).stat().st_size <= limit for name in written - alone)
    foreign.check_logits(artefact)


def test_data_file_is_not_kept_when_most_of_it_belongs_to_another_graph(foreign, tmp_path):
    def share(proto, folder):
        with (folder / "weights").open("ab") as file:
            file.write(bytes(2 * file.tell()))

    graph = foreign.changed(tmp_path / "model", share)
    before = _sha256(graph.parent / "weights")
    artefact = foreign.export(graph, tmp_path / "out")
    assert {place["location"] for place in _places(artefact).values()} == {"model.onnx.data"}
    assert not load_description(artefact).kept_data
    foreign.check_logits(artefact)
    assert _sha256(graph.parent / "weights") == before


def test_weights_are_written_anew_when_their_ranges_overlap(foreign, tmp_path):
    """Such a file cannot be looked at in one pass; what the graph computes is the same."""

    def overlap(proto, folder):
        first, second = (initializer(proto, f"model.layers.{layer}.mlp.gate_proj.weight") for layer in (0, 1))
        refer(second, offset=str(int(reference_of(first)["offset"]) + 256))

    graph = foreign.changed(tmp_path / "model", overlap)
    artefact = foreign.export(graph, tmp_path / "out")
    assert not load_description(artefact).kept_data
    weights = (graph.parent / "weights").read_bytes()
    found = onnx.load(artefact / "model.onnx").graph.initializer
    for old in onnx.load(graph, load_external_data=False).graph.initializer:
        if old.external_data and "embed" not in old.name:
            place = reference_of(old)
            offset, length = int(place["offset"]), int(place["length"])
            assert any(tensor.raw_data == weights[offset : offset + length] for tensor in found), old.name


def test_bytes_of_layers_that_were_removed_are_said_to_be_unread(foreign, tmp_path):
    def add_nothing(proto, folder):
        with (folder / "weights").open("r+b") as file:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                place = reference_of(initializer(proto, f"model.layers.1.{name}.weight"))
                file.seek(int(place["offset"]))
                file.write(bytes(int(place["length"])))

    graph = foreign.changed(tmp_path / "model", add_nothing)
    artefact = foreign.export(graph, tmp_path / "out", remove_identity=True)
    old = {name: int(place["length"]) for name, place in _places(graph.parent).items()}
    (kept,) = load_description(artefact).kept_data
    gone = sum(length for name, length in old.items() if "layers.1." in name)
    assert kept.unused_bytes == gone + kept.name.stat().st_size - sum(old.values())
    assert kept.name.read_bytes() == (graph.parent / "weights").read_bytes()


def test_packed_quantised_file_is_kept_when_layers_are_injected_and_routed(tmp_path):
    graph = save_genai_graph(tmp_path / "genai", "int4, zero points", layers=2)
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    result = export_model(ExportRequest(str(graph), tmp_path / "out", adapter=adapter), Reporter())
    assert result.description.parity.verdict == "PASS", result.parity_summary
    (kept,) = result.description.kept_data
    assert kept.name.name == "model.onnx.data"
    assert kept.name.read_bytes() == (graph.parent / "model.onnx.data").read_bytes()
    assert {place["location"] for place in _places(tmp_path / "out").values()} == {"model.onnx.data", "dlo_added.data"}


@pytest.fixture
def reflinking(tmp_path):
    """A folder whose file system has reflinks: the tests' own, or one in a file, which root may mount."""
    folder, image = tmp_path / "reflinks", tmp_path / "image"
    folder.mkdir()
    (folder / "original").write_bytes(b"block")
    with (folder / "original").open("rb") as original:
        if clone_file(original, folder / "clone"):
            yield folder
            return
    mkfs = shutil.which("mkfs.btrfs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mkfs is None or os.geteuid():
        pytest.skip("neither is here a file system with reflinks, nor can one be made: that takes root and mkfs.btrfs")
    image.touch()
    os.truncate(image, 256 << 20)
    subprocess.run([mkfs, image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], check=False, capture_output=True).returncode:
        pytest.skip("root may not mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # mappings of its files may await collection


def test_file_shares_its_blocks_with_the_sources_where_the_file_system_has_reflinks(foreign, reflinking):
    source = shutil.copytree(foreign.folder, reflinking / "model") / "weights"
    artefact = foreign.export(source.with_name("model.onnx"), reflinking / "out")
    (kept,) = load_description(artefact).kept_data
    assert kept.how == "reflink"
    assert kept.name.read_bytes() == source.read_bytes()
    assert not kept.name.samefile(source)
    open_description(artefact)
    # Until one of the two is written to.
    with source.open("r+b") as file:
        file.write(b"changed")
    assert kept.name.read_bytes() == (foreign.folder / "weights").read_bytes()


def test_links_are_made_when_they_are_asked_for(foreign, tmp_path):
    shutil.copytree(foreign.folder, tmp_path / "model")
    source = tmp_path / "model" / "weights"
    artefact = foreign.export(tmp_path / "model" / "model.onnx", tmp_path / "out", link_weights=True)
    assert (artefact / "weights").samefile(source)
    (kept,) = load_description(artefact).kept_data
    assert kept.how == "hard link"
    foreign.check_logits(artefact)
    # What is replaced is the artefact's name of the file; the source's stays.
    before = source.read_bytes()
    foreign.export(tmp_path / "model" / "model.onnx", artefact, force=True)
    assert source.read_bytes() == before
    assert source.stat().st_nlink == 1
    # A change of the one changes the other, which the artefact notices.
    foreign.export(tmp_path / "model" / "model.onnx", artefact, force=True, link_weights=True)
    with source.open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(InputError, match="weights: was changed: its sha256"):
        open_description(artefact)


def test_links_are_refused_when_there_can_be_none(foreign, tmp_path):
    with pytest.raises(InputError, match="--link-weights is for a graph whose weights lie in data files beside it"):
        export_model(ExportRequest(str(foreign.folder / "checkpoint"), tmp_path / "out", link_weights=True), Reporter())
    with pytest.raises(InputError, match="--link-weights and --no-weights: there is nothing to link"):
        ExportRequest(str(foreign.folder / "model.onnx"), tmp_path / "out", link_weights=True, weights=False)
    elsewhere = "/dev/shm"
    if not os.path.isdir(elsewhere) or os.stat(elsewhere).st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    shutil.copytree(foreign.folder, tmp_path / "model")
    output = Path(elsewhere) / f"dlo-test-{os.getpid()}"
    with pytest.raises(MachineError, match=r"--link-weights: .* cannot be linked"):
        foreign.export(tmp_path / "model" / "model.onnx", output, link_weights=True)
    assert not output.exists()
    # A copy needs no such place.
    artefact = foreign.export(tmp_path / "model" / "model.onnx", output)
    try:
        assert load_description(artefact).kept_data[0].how == "copy"
    finally:
        shutil.rmtree(artefact)


@pytest.mark.parametrize("link", [False, True])
def test_weights_that_are_no_numbers_are_refused_in_kept_files_too(foreign, tmp_path, link):
    def damage(proto, folder):
        place = reference_of(initializer(proto, WEIGHT))
        with (folder / "weights").open("r+b") as file:
            file.seek(int(place["offset"]) + 8)
            file.write(np.float32(np.nan).tobytes())

    graph = foreign.changed(tmp_path / "model", damage)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(NonFiniteWeightError, match=r"down_proj.*\[0, 2\] is nan"):
        foreign.export(graph, tmp_path / "out", link_weights=link)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    foreign.export(graph, tmp_path / "out", link_weights=link, allow_nonfinite=True)


@pytest.mark.parametrize("change", ["longer", "shorter", "touched"])
def test_file_is_refused_when_it_changes_while_it_is_read(foreign, tmp_path, change, monkeypatch):
    shutil.copytree(foreign.folder, tmp_path / "model")
    source, size = tmp_path / "model" / "weights", (foreign.folder / "weights").stat().st_size
    monkeypatch.setattr(kept_data, "_CHUNK_BYTES", 4096)
    fill = kept_data._fill
    chunks = []

    def changed_meanwhile(file, chunk):
        chunks.append(chunk.nbytes)
        if len(chunks) == 3:
            with source.open("r+b") as other:
                other.truncate({"longer": size + 1, "shorter": 5000, "touched": size}[change])
            os.utime(source, ns=(1, 1))
        fill(file, chunk)

    monkeypatch.setattr(kept_data, "_fill", changed_meanwhile)
    with pytest.raises(InputError, match="weights: was changed while it was being read"):
        foreign.export(tmp_path / "model" / "model.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_says_which_files_are_the_sources(foreign, tmp_path, capsys):
    artefact = foreign.export(foreign.folder / "model.onnx", tmp_path / "out")
    app(["inspect", str(artefact)], standalone_mode=False)
    assert "kept as the source has them (" in capsys.readouterr().out.replace("\n", " ")
    app(["inspect", str(artefact), "--json"], standalone_mode=False)
    (kept,) = json.loads(capsys.readouterr().out)["description"]["kept_data"]
    assert kept["name"] == "weights"


def test_clone_shares_content_and_not_changes_where_the_file_system_can(tmp_path):
    (tmp_path / "source").write_bytes(bytes(range(256)) * 64)
    with (tmp_path / "source").open("rb") as source:
        if not clone_file(source, tmp_path / "clone"):
            assert not (tmp_path / "clone").exists()
            return
    with (tmp_path / "clone").open("r+b") as file:
        file.write(b"changed")
    assert (tmp_path / "source").read_bytes() == bytes(range(256)) * 64
    assert (tmp_path / "clone").read_bytes()[:7] == b"changed"


def test_hash_of_the_source_is_that_of_its_files_however_they_were_read(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "fp32", layers=2)
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    result = export_model(ExportRequest(str(graph), tmp_path / "out", adapter=adapter, parity=False), Reporter())
    digest = hashlib.sha256()
    for file in (graph, graph.parent / "weights"):
        digest.update(bytes.fromhex(_sha256(file)))
    assert result.description.source.sha256 == digest.hexdigest() == open_foreign_graph(graph).sha256()


def test_pages_of_the_data_file_are_given_back_when_layers_are_asked_whether_they_are_zeros(tmp_path):
    """A column of a matrix that lies in rows touches every page of it."""
    size = 2048
    np.zeros((size, size), np.float32).tofile(tmp_path / "weights")
    tensor = ir.ExternalTensor(
        "weights", 0, 4 * size**2, ir.DataType.FLOAT, shape=ir.Shape([size, size]), name="w", base_dir=tmp_path
    )
    node = ir.Node("", "MatMul", [ir.Value(name="x"), ir.Value(name="w", const_value=tensor)])
    storage = dense_storage(Place(node, 1), "in_out")
    rows = StoredRows(storage, 0, size)
    kept = rows.rows(0, 2)
    assert all_zeros(rows)
    assert _resident_kilobytes(tmp_path / "weights") < 64
    assert not kept.any(), "arrays stay valid"


def _resident_kilobytes(path):
    """Of a mapped file, in this process."""
    found, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            mapped = line.endswith(str(path))
        elif mapped and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found
