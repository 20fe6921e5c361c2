"""Every kind of base model answers the same questions."""

import json

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.checkpoint_folder import save_checkpoint
from dlo_export.checkpoints.depth.expansion import expanded_config, expanded_tensors, expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.calibrate import CalibrationRequest, calibrate
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.base_model import check_use
from dlo_export.exporter.sources.source import open_source
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings
from tests.foreign_graphs import save_foreign_graph
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama

HIDDEN = 32


def _routers(folder, layers, routing="mlp"):
    tensors = {"model.routers.0.weight": ArrayTensor(np.ones((1, HIDDEN), np.float32))}
    is_dlo = (True,) + (False,) * (layers - 1)
    save_adapter(DloAdapter(routing, is_dlo, injected_layers=(), tensors=tensors), folder)
    return folder


@pytest.fixture(params=["checkpoint", "gguf", "onnx"])
def model(request, tmp_path):
    """Its kind, and a model of three layers in float16."""
    if request.param == "onnx":
        return request.param, save_foreign_graph(tmp_path / "foreign", "fp16")
    folder = save_tiny_llama(tmp_path / "model", dtype="float16", vocab=300, tokenizer=True)
    if request.param == "checkpoint":
        return request.param, folder
    return request.param, save_tiny_gguf(folder, tmp_path / "model.gguf", "F16", tokenizer="llama-bpe")


def test_every_kind_answers_alike_when_it_is_asked(model, tmp_path):
    kind, path = model
    source = open_source(path, _routers(tmp_path / "routers", 3))
    base = source.base
    assert (base.kind, source.kind, base.path) == (kind, kind, path)
    assert (base.stored_dtype, base.num_layers, base.injected_layers, base.routing) == ("float16", 3, (), None)
    assert base.config is not None
    assert base.tensor_shapes() == {name: tensor.shape for name, tensor in base.tensors.items()}
    assert base.tensor_shapes() == base.config.tensor_shapes()
    assert len(base.sha256()) == 64
    assert len(find_decoder_layers(source.plain_model(graph_dtype("fp16")).graph)) == 3
    assert base.graph_dtype("fp16") == "fp16"
    assert source.config_json()["is_dlo"] == [True, False, False]
    assert source.identity_layers() == ()
    assert base.why_not("parity") is None
    (tmp_path / "companions").mkdir()
    base.save_companions(tmp_path / "companions", {"num_hidden_layers": 7})
    assert json.loads((tmp_path / "companions" / "config.json").read_text())["num_hidden_layers"] == 7
    source.close()


def test_every_kind_is_refused_what_it_does_not_serve_by_itself(model):
    kind, path = model
    uses = ("export without adapter", "calibration")
    if kind != "onnx":
        source = open_source(path, None)
        assert [source.base.why_not(use) for use in (*uses, "TensorRT")] == [None] * 3
        assert source.base.graph_dtype("auto") == "fp32"
        source.close()
        return
    with pytest.raises(InputError, match=r"no adapter was given[\s\S]*hint: add --adapter"):
        open_source(path, None)
    source = open_source(path, _routers(path.parent / "routers", 3))
    for use in uses:
        with pytest.raises(InputError, match=r"model\.onnx: is (an ONNX graph|a graph)[\s\S]*hint: "):
            check_use(source.base, use)
    assert source.base.graph_dtype("auto") == "fp16"
    (path.parent / "config.json").unlink()
    alone = open_source(path, path.parent / "routers")
    with pytest.raises(InputError, match=r"no config\.json[\s\S]*hint: put the config\.json"):
        check_use(alone.base, "TensorRT")
    with pytest.raises(InputError, match=r"no config\.json[\s\S]*hint: put the config\.json"):
        alone.config_json()


def test_calibration_of_a_graph_is_refused_with_the_way_round(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    request = CalibrationRequest(
        model=str(graph),
        output=tmp_path / "out",
        adapter=_routers(tmp_path / "routers", 3),
        as_adapter=True,
        settings=CalibrationSettings(),
        text=None,
        tokens=512,
        evaluation_tokens=512,
        seed=0,
        force=False,
    )
    with pytest.raises(InputError, match=r"routers are fitted to a checkpoint[\s\S]*hint: .*--as-adapter"):
        calibrate(request, Reporter())
    assert not (tmp_path / "out").exists()


def test_adapter_is_refused_when_the_base_has_routers(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    with pytest.raises(InputError, match=r"already has routers[\s\S]*hint: "):
        open_source(folder, _routers(tmp_path / "routers", 3))


def test_layers_injected_before_are_kept_when_an_adapter_adds_more(tmp_path):
    with open_checkpoint(save_tiny_llama(tmp_path / "model")) as checkpoint:
        once = placements("tli", 3, every=3)
        changes = expanded_config({**checkpoint.config.raw, "layer_types": ["full_attention"] * 3}, once)
        tensors = expanded_tensors(checkpoint.tensors, once)
        save = checkpoint.save_companions
        save_checkpoint(tensors, tmp_path / "deep", save_companions=save, config_changes=changes)
    with open_checkpoint(tmp_path / "deep") as checkpoint:
        save_adapter(expansion_adapter(checkpoint.tensors, placements("llama-pro", 4, groups=2)), tmp_path / "adapter")
    result = export_model(
        ExportRequest(str(tmp_path / "deep"), tmp_path / "out", adapter=tmp_path / "adapter"), Reporter()
    )
    assert result.description.parity.verdict == "PASS"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 6
    # 0 1 2 n2 becomes 0 1 [c1] 2 n2 [c2]: sources are layers of the model that was there first.
    injected = [(layer.index, layer.source) for layer in result.description.layers if layer.injected]
    assert injected == [(2, 1), (4, 2), (5, 2)]
    assert [(entry["position"], entry["source"]) for entry in config["injected_layers"]] == injected


@pytest.mark.parametrize(("routing", "model_type"), [("mlp", "llama_dlo_exattn"), ("layer", "llama_dlo")])
def test_config_says_what_an_adapters_routers_skip(tmp_path, routing, model_type):
    folder = save_tiny_llama(tmp_path / "model")
    source = open_source(folder, _routers(tmp_path / "routers", 3, routing))
    assert source.routing.kind == routing
    assert (source.config_values()["model_type"], source.config_json()["model_type"]) == (model_type, model_type)
