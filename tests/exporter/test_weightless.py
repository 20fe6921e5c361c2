"""A graph without weights: made of what config.json says, read by what reads graphs, run by nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from dlo_export.checkpoints.adapter.adapter import DloAdapter, InjectedLayer, save_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import layer_tensor_name, router_name
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.inspection import inspect_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.export import engine_request, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.tensorrt.engines import load_engines
from tests.tiny_models import save_tiny_llama

ROUTED = {"routed": (True, False, True), "dtype": "bfloat16"}


def config_alone(model: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(model / "config.json", folder / "config.json")
    return folder


def weightless(model: Path, output: Path, **options: object) -> ExportResult:
    return export_model(ExportRequest(str(model), output, weights=False, **options), Reporter())  # type: ignore[arg-type]


def routing_adapter(model: Path, folder: Path) -> Path:
    """A copy of layer 1 behind it, and routers in the new layer and in the last one."""
    with open_checkpoint(model) as base:
        names = [name.removeprefix("model.layers.1.") for name in base.tensors if name.startswith("model.layers.1.")]
        new = {layer_tensor_name(2, name): base.tensors[layer_tensor_name(1, name)] for name in names}
        routers = {router_name(layer): ArrayTensor(np.ones((1, 32), np.float32)) for layer in (2, 3)}
        adapter = DloAdapter(
            "mlp",
            (False, False, True, True),
            injected_layers=(InjectedLayer(2, 1, "copy"),),
            base_sha256="0" * 64,  # of other weights; nobody can tell
            tensors={**new, **routers},
        )
        save_adapter(adapter, folder)
    return folder


def graph_without_places(path: Path) -> onnx.ModelProto:
    """A graph and what its weights look like, wherever they lie."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if re.search(r"weight|routers\.\d", tensor.name):
            tensor.ClearField("external_data")
            tensor.ClearField("raw_data")
            tensor.ClearField("data_location")
    del model.metadata_props[:]  # a digest of the routers stands in there
    return model


@pytest.mark.parametrize("with_adapter", [False, True], ids=["routed", "adapter"])
def test_graph_is_the_same_when_its_weights_are_left_out(tmp_path: Path, with_adapter: bool) -> None:
    model = save_tiny_llama(tmp_path / "model", **({"dtype": "bfloat16"} if with_adapter else ROUTED))
    adapter = routing_adapter(model, tmp_path / "adapter") if with_adapter else None
    options = {"adapter": adapter, "dtype": "bf16"}
    whole = ExportRequest(str(model), tmp_path / "whole", parity=False, force_base=True, **options)
    described = export_model(whole, Reporter()).description
    (tmp_path / "config").mkdir()
    # Of the same name, which the graph is called after.
    found = weightless(config_alone(model, tmp_path / "config" / "model"), tmp_path / "out", **options)
    graphs = [graph_without_places(tmp_path / name / "model.onnx") for name in ("whole", "out")]
    assert graphs[0] == graphs[1]
    assert found.description.interface == described.interface
    assert found.description.routing == described.routing


def test_description_and_commands_say_that_there_are_no_weights(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", **ROUTED)
    description = weightless(config_alone(model, tmp_path / "config"), tmp_path / "out").description
    assert [file.name.name for file in description.files] == ["model.onnx"]
    assert description.source.sha256 is None
    assert {layer.identity for layer in description.layers} == {None}
    assert (description.parity.verdict, description.parity.reason) == ("NOT RUN", "--no-weights")
    assert open_description(tmp_path / "out") == description
    assert inspect_model(tmp_path / "out").has_weights is False
    with pytest.raises(ModelLoadError, match=r"has no weights, model\.onnx\.data was left out"):
        open_artefact(tmp_path / "out")


def test_no_weight_is_in_the_graph_and_the_checker_takes_it_when_a_data_file_is_there(tmp_path: Path) -> None:
    """Whatever the sizes: norms and routers of a tiny model would fit into the .onnx file."""
    model = save_tiny_llama(tmp_path / "model", **ROUTED)
    weightless(config_alone(model, tmp_path / "config"), tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    inside = {tensor.name for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL}
    assert not [name for name in inside if "weight" in name]
    external = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
    assert {place["location"] for place in places} == {"model.onnx.data"}
    assert not (tmp_path / "out" / "model.onnx.data").exists()
    with (tmp_path / "out" / "model.onnx.data").open("wb") as file:  # sparse: nothing is written
        file.truncate(max(int(place["offset"]) + int(place["length"]) for place in places))
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("kind", ["llama_dlo_exattn", "llama_dlo_attn"])
def test_engines_graph_is_the_same_when_there_are_no_weights_to_build_an_engine_of(tmp_path: Path, kind: str) -> None:
    model = save_tiny_llama(tmp_path / "model", **ROUTED, model_type=kind)
    request = TensorRtRequest(targets=("sm89",), max_cache=64, max_sequence=32, split=True)
    alone = weightless(config_alone(model, tmp_path / "config"), tmp_path / "out", trt=request)
    engines = tmp_path / "out" / "engines"
    assert sorted(path.name for path in engines.iterdir()) == ["decode.onnx", "prefill.onnx"]
    described = alone.description
    assert (described.engines, described.parity.reason) == ((), "--no-weights")
    assert {file.name.name for file in described.files} == {"model.onnx", "decode.onnx", "prefill.onnx"}
    plan = plan_tensorrt(open_source(str(model), None), request, "auto", "auto")
    save_graphs(plan, tmp_path / "whole", Reporter())
    for name in ("decode.onnx", "prefill.onnx"):
        graphs = [graph_without_places(folder / name) for folder in (engines, tmp_path / "whole")]
        assert graphs[0].graph.name == graphs[1].graph.name
        assert graphs[0] == graphs[1]
    with pytest.raises(ModelLoadError, match="has no engines") as error:
        load_engines(tmp_path / "out")
    assert error.value.hint == "export the model again with --trt, and without --no-weights"


def test_engine_is_asked_for_each_gpu_once_when_one_is_named_twice(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", **ROUTED)
    request = TensorRtRequest(backend="rtx", targets=("sm120", "sm89", "sm120", "sm89"), max_cache=64, max_sequence=32)
    plan = plan_tensorrt(open_source(str(model), None), request, "auto", "auto")
    asked = engine_request(plan, plan.engines[0], tmp_path)
    assert asked.targets == plan.request.targets == ("sm120", "sm89")


def test_weights_are_not_read_when_they_are_there(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", **ROUTED)
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: torch.full_like(tensor, math.nan) for name, tensor in weights.items()}, model / "model.safetensors"
    )
    with pytest.raises(InputError, match="expected finite numbers"):
        export_model(ExportRequest(str(model), tmp_path / "out", parity=False), Reporter())
    assert weightless(model, tmp_path / "out").description.source.sha256 is None


def test_what_only_weights_tell_is_refused_when_they_are_left_out(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    with pytest.raises(InputError, match="which layers pass everything on, only their weights tell"):
        weightless(model, tmp_path / "out", remove_identity=True)
    alone = config_alone(model, tmp_path / "config")
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        export_model(ExportRequest(str(alone), tmp_path / "out"), Reporter())
    assert not (tmp_path / "out").exists()
    values = json.loads((alone / "config.json").read_text()) | {"num_hidden_layers": 2.5}
    (alone / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="num_hidden_layers"):
        weightless(alone, tmp_path / "out")
