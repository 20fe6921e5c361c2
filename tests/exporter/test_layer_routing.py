"""Models of which tokens skip whole layers, from the command line to tokens."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import DloAdapter, load_adapter, save_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import parse_router
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.exporter.forked_commands import run as dlo
from tests.exporter.test_cli import check_refused
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

HIDDEN = 32
OPTIMUM = Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layer_routing") / "model"
    return save_tiny_llama(
        folder, vocab=BYTE_VOCABULARY, tokenizer=True, routed=[True, False, True], model_type="llama_dlo"
    )


@pytest.fixture(scope="module", params=["auto", "masked", "if"])
def exported(model: Path, request: pytest.FixtureRequest) -> ExportResult:
    output = model.with_name(request.param)
    return export_model(ExportRequest(str(model), output, lowering=request.param), Reporter())


def test_artefact_equals_pytorch_and_says_so_when_layers_are_skipped_whole(exported: ExportResult) -> None:
    description = exported.description
    assert description.parity.verdict == "PASS"
    assert description.routing is not None
    assert (description.routing.kind, description.routing.layers) == ("layer", (0, 2))
    inputs = {spec.name: spec for spec in description.interface.inputs}
    outputs = {spec.name: spec for spec in description.interface.outputs}
    assert [name for name in inputs if "active" in name] == ["past_active.0", "past_active.2"]
    assert (inputs["past_active.0"].dtype, inputs["past_active.0"].shape) == ("bool", ("batch_size", "past_sequence"))
    assert outputs["present_active.2"].shape == ("batch_size", "total_sequence")


def test_greedy_tokens_are_pytorchs_when_prompts_are_padded(model: Path, exported: ExportResult) -> None:
    prompts = [[5, 9, 200, 31, 7], [77, 3]]
    with open_artefact(exported.folder) as runner, TorchRunner.from_folder(model, masked=True) as reference:
        found, wanted = (generate(each, prompts, max_new_tokens=12) for each in (runner, reference))
    assert found.sequences == wanted.sequences
    assert found.stats.active_rate == wanted.stats.active_rate
    assert list(found.stats.active_rate) == [0, 2]


@pytest.mark.parametrize("exported", ["auto"], indirect=True)
def test_commands_take_the_artefact_when_layers_are_skipped_whole(exported: ExportResult) -> None:
    inspected = " ".join(dlo("inspect", exported.folder).stdout.split())
    assert "a token that skips a layer saves its part of the layer's projections and MLP" in inspected
    run = dlo("run", exported.folder, "abc", "-n", "3")
    assert (run.returncode, "active, original layers:" in run.stderr) == (0, True), run.stderr
    bench = dlo("bench", exported.folder, "--prompt-tokens", "8", "--decode-tokens", "2", "--rounds", "1")
    assert bench.returncode == 0, bench.stderr


@pytest.mark.parametrize("exported", ["auto"], indirect=True)
def test_sequences_go_on_apart_when_they_were_forked_from_one(exported: ExportResult) -> None:
    ids = np.random.default_rng(1).integers(3, 200, (2, 9))
    ids[1, :6] = ids[0, :6]
    mask, positions = np.ones_like(ids), np.tile(np.arange(9), (2, 1))
    with open_artefact(exported.folder) as runner:
        runner.reset(2)
        expected = runner.step(ids, mask, positions).logits[:, 6:]
        runner.reset(1)
        runner.step(ids[:1, :6], mask[:1, :6], positions[:1, :6])
        runner.fork(2)
        found = runner.step(ids[:, 6:], mask, positions[:, 6:]).logits
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exported", ["auto"], indirect=True)
def test_artefact_is_refused_when_its_description_says_another_routing(exported: ExportResult, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "edited")
    text = (folder / "dlo_artifact.json").read_text()
    (folder / "dlo_artifact.json").write_text(text.replace('"kind": "layer"', '"kind": "mlp"'))
    with pytest.raises(InputError, match=r"routing\.kind is mlp, model\.onnx has inputs past_active\.\{i\}"):
        open_description(folder)


def _routed_adapter(base: Path, folder: Path) -> Path:
    """Identity layers injected, a router of its own for every layer of the deepened model."""
    result = dlo("expand", base, "-o", folder / "deep", "--every", 1, "--routers", "--routing", "layer", "--adapter")
    assert result.returncode == 0, result.stderr
    adapter, rng = load_adapter(folder / "deep"), np.random.default_rng(0)
    tensors = {
        name: tensor if parse_router(name) is None else ArrayTensor(rng.standard_normal((1, HIDDEN)).astype("float32"))
        for name, tensor in adapter.tensors.items()
    }
    save_adapter(dataclasses.replace(adapter, tensors=tensors), folder / "routed")
    return folder / "routed"


def test_injected_layers_are_skipped_whole_when_an_adapter_says_so(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY)
    adapter = _routed_adapter(base, tmp_path)
    result = export_model(ExportRequest(str(base), tmp_path / "out", adapter=adapter), Reporter())
    assert result.description.parity.verdict == "PASS"
    assert [layer.index for layer in result.description.layers if layer.injected and layer.identity] == [1, 3, 5]
    assert result.description.routed_layers == tuple(range(6))


def test_export_refuses_another_exporters_attention_when_layers_are_skipped_whole(tmp_path: Path) -> None:
    router = {"model.routers.1.weight": ArrayTensor(np.ones((1, HIDDEN), np.float32))}
    save_adapter(DloAdapter("layer", (False, True, False), tensors=router), tmp_path / "adapter")
    result = dlo("export", OPTIMUM, "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    check_refused(result, tmp_path, "RouteLayersPass: ", "no Attention node")
