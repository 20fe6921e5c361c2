"""Artefacts whose files are links: a hub's cache, a folder of links, weights that were moved to another disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.layer_parity import check_parity_by_layer
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.genai_graphs import save_genai_graph
from tests.tiny_models import save_tiny_llama

IDS = np.array([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linked") / "model"
    save_tiny_llama(folder, routed=(True, False, True))
    # In several files of weights, which may lie apart.
    request = ExportRequest(str(folder), folder.with_name("out"), parity=False, weight_file_bytes=1 << 16)
    assert len(export_model(request, Reporter()).description.files) > 2
    return folder


def hub_snapshot(artefact: Path, folder: Path) -> Path:
    """As a hub's client leaves it: links to files that are called by their hashes."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(artefact.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot


def folder_of_links(artefact: Path, folder: Path) -> Path:
    (folder / "links").mkdir()
    for file in artefact.iterdir():
        (folder / "links" / file.name).symlink_to(file)
    return folder / "links"


def moved_weights(artefact: Path, folder: Path) -> Path:
    """One file of them elsewhere, under another name."""
    (folder / "disk").mkdir()
    moved = next(file for file in sorted(shutil.copytree(artefact, folder / "out").iterdir()) if ".data" in file.name)
    shutil.move(moved, folder / "disk" / "weights")
    moved.symlink_to(os.path.relpath(folder / "disk" / "weights", moved.parent))
    return folder / "out"


LINKED = [hub_snapshot, folder_of_links, moved_weights]


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("linked", LINKED)
def test_artefact_computes_the_same_when_its_files_are_links(
    model: Path, linked: Callable[[Path, Path], Path], scores: bool, tmp_path: Path
) -> None:
    artefact = model.with_name("out")
    logits = []
    for folder in (artefact, linked(artefact, tmp_path)):
        with open_artefact(folder, scores=scores) as runner:
            runner.reset(1)
            result = runner.step(IDS, np.ones_like(IDS), np.arange(4)[np.newaxis])
            logits.append(result.logits)
            assert bool(result.router_scores) == scores
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("linked", LINKED)
def test_parity_passes_when_an_artefacts_files_are_links(
    model: Path, linked: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    folder = linked(model.with_name("out"), tmp_path)
    description = open_description(folder)
    with contextlib.closing(open_source(str(model), None)) as source:
        assert check_parity(source, folder, description).verdict == "PASS"
        assert check_parity_by_layer(source, folder, description, None).verdict == "PASS"


@pytest.mark.parametrize("link_weights", [False, True])
def test_graph_is_deepened_and_compared_with_what_it_was_when_its_data_are_links(
    link_weights: bool, tmp_path: Path
) -> None:
    graph = save_genai_graph(tmp_path / "genai", "int4")
    opened = open_foreign_graph(graph)
    adapter = expansion_adapter(opened.tensors, placements("tli", opened.num_layers, every=1))
    save_adapter(adapter, tmp_path / "adapter")
    source = hub_snapshot(graph.parent, tmp_path) / graph.name
    assert (source.parent / "model.onnx.data").is_symlink()
    request = ExportRequest(str(source), tmp_path / "out", adapter=tmp_path / "adapter", link_weights=link_weights)
    result = export_model(request, Reporter())
    assert result.description.parity.verdict == "PASS"
    assert "against the graph as it was" in (result.parity_summary or "")
    assert (result.folder / "model.onnx.data").read_bytes() == (graph.parent / "model.onnx.data").read_bytes()


def test_link_is_named_when_a_graph_is_run_by_its_file(model: Path, tmp_path: Path) -> None:
    folder = moved_weights(model.with_name("out"), tmp_path)
    with pytest.raises(ModelLoadError, match="cannot load it") as error:
        OnnxRuntimeRunner(folder / "model.onnx")
    assert error.value.hint == "put the data file itself in the model's folder, in place of the link"
