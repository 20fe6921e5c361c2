"""A checkpoint, or an adapter, whose routers have thresholds: from the file to the artefact and its reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import dlo_export.modeling.llama_dlo  # noqa: F401 - registers the routed models
from dlo_export.checkpoints.adapter.adapter import load_adapter, save_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.inspection import inspect_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.evaluation.scorer import RunnerScorer, Segment
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.parity.statistics import flips
from dlo_export.runtimes.torch.scorer import TorchScorer
from tests.exporter.forked_commands import run
from tests.tiny_models import save_tiny_llama

ROUTED = [True, False, True, True]
THRESHOLDS = {0: 0.3, 3: 0.6}
OPTIMUM = Path(__file__).parents[1] / "data" / "optimum_llama"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(
        tmp_path_factory.mktemp("model") / "routed", layers=4, routed=ROUTED, thresholds=THRESHOLDS, scale_gap=0.7
    )


@pytest.fixture(scope="module")
def artefact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact") / "out"
    export_model(ExportRequest(str(checkpoint), folder, parity=False), Reporter())
    return folder


def expected_active(checkpoint: Path, ids: np.ndarray) -> dict[int, np.ndarray]:
    """From the formula, on transformers' own reading of the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model.config).model_type == "llama_dlo_exattn_thresholds"
    with torch.no_grad():
        streams = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    active = {}
    for layer in (0, 2, 3):
        score = torch.sigmoid(streams[layer] @ model.model.router(layer).weight[0].detach())
        active[layer] = score.numpy() > np.float32(THRESHOLDS.get(layer, 0.5))
    return active


@pytest.mark.parametrize("lowering", ["masked", "compact", "if"])
@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_parity_passes_when_exported_as(checkpoint: Path, tmp_path: Path, kind: str, lowering: str) -> None:
    if kind == "layer":  # of routers that scale nothing, so that no score is needed to run them
        options: dict[str, Any] = {"model_type": "llama_dlo", "rescale": False}
        folder = tmp_path / "model"
        checkpoint = save_tiny_llama(folder, layers=4, routed=ROUTED, thresholds=THRESHOLDS, **options)
    result = export_model(ExportRequest(str(checkpoint), tmp_path / "out", lowering=lowering), Reporter())
    assert result.description.parity.verdict == "PASS"
    assert result.description.routing is not None
    assert result.description.routing.kind == kind
    assert len(result.description.router_thresholds) == 2
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    by_logits = {router.scores is None for router in find_routers(graph).values()}
    assert by_logits == {kind == "layer" and lowering != "masked"}
    assert open_description(tmp_path / "out").router_thresholds == result.description.router_thresholds


def test_parity_passes_for_tensorrts_graphs(checkpoint: Path, artefact: Path) -> None:
    graphs = [TensorRtOptions("compact"), TensorRtOptions("if", cache="growing"), TensorRtOptions("plugin")]
    report = check_parity(open_source(checkpoint, None), artefact, open_description(artefact), graphs)
    assert report, report.summary()
    assert len({case.candidate for case in report.cases}) == 5


def test_decisions_are_by_the_layers_thresholds(checkpoint: Path, artefact: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 97, (2, 40))
    active = expected_active(checkpoint, ids)
    segments = [Segment(row, 1) for row in ids]
    in_torch = TorchScorer(AutoModelForCausalLM.from_pretrained(checkpoint)).score(segments)
    with open_artefact(artefact) as runner:
        runner.reset(2)
        result = runner.step(ids, np.ones_like(ids), np.tile(np.arange(40), (2, 1)))
        decided = runner.active(result.router_scores)
        halves = {layer: scores > 0.5 for layer, scores in result.router_scores.items()}
        scored = RunnerScorer(runner).score(segments)
        stats = generate(runner, ids.tolist(), max_new_tokens=1).stats
    for layer in (0, 2, 3):
        np.testing.assert_array_equal(decided[layer], active[layer])
        assert (layer == 2) == bool((halves[layer] == active[layer]).all())
        assert scored.active[layer] == in_torch.active[layer] == active[layer][:, :-1].sum()
        assert stats.active_rate[layer] == pytest.approx(active[layer].mean())


def test_artefact_says_its_thresholds(checkpoint: Path, artefact: Path) -> None:
    exact = {str(layer): float(np.float32(threshold)) for layer, threshold in THRESHOLDS.items()}
    description = json.loads((artefact / "dlo_artifact.json").read_text())
    assert description["routing"]["router_thresholds"] == exact
    assert "> the layer's threshold" in description["routing"]["rule"]
    config = json.loads((artefact / "config.json").read_text())
    assert config["dlo_model_type"] == "llama_dlo_exattn_thresholds"
    assert config["router_thresholds"] == {"0": 0.3, "3": 0.6}
    metadata = {
        entry.key: entry.value for entry in onnx.load(artefact / "model.onnx", load_external_data=False).metadata_props
    }
    assert metadata["router_thresholds"] == " ".join(f"{layer}:{value}" for layer, value in exact.items())
    rows = inspect_model(artefact).layers
    assert [row["threshold"] for row in rows] == [exact["0"], None, 0.5, exact["3"]]


def test_inspect_shows_thresholds(artefact: Path, tmp_path: Path) -> None:
    shown = run("inspect", artefact)
    assert shown.returncode == 0, shown.stderr
    assert "above 0.3000" in shown.stdout
    assert "above 0.6000" in shown.stdout


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"0": 0.3}, "routing.router_thresholds are {'0': 0.3}, model.onnx compares with"),
        ({}, "routing.router_thresholds are {}, model.onnx compares with"),
        ({"1": 0.3}, "routing.router_thresholds names layers"),
        ({"0": 0.3, "3": 1.5}, "routing.router_thresholds.3 is 1.5, expected a score above 0 and below 1"),
        ([], "routing.router_thresholds is a list, expected an object"),
        (None, "routing.router_thresholds is None, expected an object"),
    ],
)
def test_description_is_refused_when_thresholds_are_not_the_graphs(
    artefact: Path, tmp_path: Path, changed: Any, problem: str
) -> None:
    for file in artefact.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    values = json.loads((artefact / "dlo_artifact.json").read_text())
    values["routing"]["router_thresholds"] = changed
    (tmp_path / "dlo_artifact.json").unlink()
    (tmp_path / "dlo_artifact.json").write_text(json.dumps(values))
    with pytest.raises(ModelLoadError) as caught:
        open_description(tmp_path)
    assert problem in str(caught.value)


def test_parity_fails_when_the_graph_compares_with_another_threshold(
    checkpoint: Path, artefact: Path, tmp_path: Path
) -> None:
    for name in ("model.onnx.data", "dlo_artifact.json"):
        (tmp_path / name).hardlink_to(artefact / name)
    model = onnx.load(artefact / "model.onnx", load_external_data=False)
    changed = next(each for each in model.graph.initializer if each.name == "model.routers.3.threshold")
    changed.CopyFrom(onnx.numpy_helper.from_array(np.array(0.4, np.float32), changed.name))
    onnx.save(model, tmp_path / "model.onnx")
    report = check_parity(open_source(checkpoint, None), tmp_path, open_description(artefact))
    assert report.verdict == "FAIL", report.summary()


def test_flips_are_measured_from_the_layers_threshold() -> None:
    wanted, found = {1: np.array([[0.3001, 0.6]], np.float32)}, {1: np.array([[0.2999, 0.4]], np.float32)}
    (flip,) = flips(wanted, found, np.ones((1, 2), bool), {1: 0.3})
    assert (flip.layer, flip.position, flip.threshold) == (1, 0, 0.3)
    assert flip.margin == pytest.approx(1e-4, rel=0.01)


def test_thresholds_of_an_adapter_reach_the_graph_when_it_is_on_somebodys_graph(tmp_path: Path) -> None:
    made = run("expand", OPTIMUM, "-o", tmp_path / "tli", "--adapter", "--every", 1)
    assert made.returncode == 0, made.stderr
    plain = load_adapter(tmp_path / "tli")
    hidden = next(iter(plain.layer_tensors(plain.injected_layers[0].position).values())).shape[-1]
    layers = range(plain.num_layers)
    rng = np.random.default_rng(0)
    routers = {
        f"model.routers.{layer}.weight": ArrayTensor(rng.standard_normal((1, hidden)).astype(np.float32))
        for layer in layers
    }
    routed = dataclasses.replace(
        plain,
        is_dlo=(True,) * plain.num_layers,
        router_thresholds={0: 0.25, plain.num_layers - 1: 0.75},
        tensors={**plain.tensors, **routers},
    )
    save_adapter(routed, tmp_path / "adapter")
    request = ExportRequest(str(OPTIMUM / "model.onnx"), tmp_path / "out", adapter=tmp_path / "adapter")
    result = export_model(request, Reporter())
    assert result.description.parity.verdict == "PASS"
    assert open_description(tmp_path / "out").router_thresholds == {0: 0.25, plain.num_layers - 1: 0.75}


def test_zero_routers_are_no_concern_when_their_threshold_lets_everything_through(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", routed=[True, True, False], thresholds={0: 0.4})
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.routers.{layer}.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (warning,) = open_source(folder, None).warnings
    assert warning.startswith("the routers of layers 1 are all zeros")


def test_export_names_the_layer_when_a_checkpoints_threshold_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", routed=[True, False, True], thresholds={1: 0.4, 2: 2.0})
    result = run("export", folder, "-o", tmp_path / "out")
    assert result.returncode == 2
    for words in ("router_thresholds.1 names a layer that is not routed", "router_thresholds.2 is 2.0", "hint:"):
        assert words in result.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        open_source(folder, None)
