"""Someone else's graph with an adapter: `dlo-export model.onnx --adapter DIR`."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import quantize_dynamic
from tokenizers import Tokenizer

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.app import app
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.graph_passes.errors import DecoderLayersNotFound
from tests.foreign_graphs import save_foreign_graph
from tests.foreign_protos import leave_later_tokens_to_attention
from tests.tiny_sentencepiece import train_sentencepiece

GRAPH = Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx"


@pytest.fixture
def adapter(tmp_path):
    """TLI after every layer of the fixture, and routers that let about half of the tokens through."""
    graph = open_foreign_graph(GRAPH)
    plan = placements("tli", graph.num_layers, every=1)
    injection = expansion_adapter(graph.tensors, plan)
    rng = np.random.default_rng(0)
    hidden = graph.tensors["model.norm.weight"].shape[0]
    routers = {
        f"model.routers.{i}.weight": ArrayTensor(rng.standard_normal((1, hidden)).astype(np.float32))
        for i in range(plan.num_layers)
    }
    routed = dataclasses.replace(
        injection,
        is_dlo=(True,) * plan.num_layers,
        rescale_hidden_states=True,
        scale_gap=0.05,
        tensors={**injection.tensors, **routers},
    )
    save_adapter(routed, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("lowering", ["masked", "compact", "if"])
def test_export_of_optimums_graph_equals_pytorch_when_injected_and_routed(adapter, tmp_path, lowering):
    request = ExportRequest(str(GRAPH), tmp_path / "out", adapter=adapter, lowering=lowering)
    result = export_model(request, Reporter())
    assert result.description.parity.verdict == "PASS", result.parity_summary
    layers = result.description.layers
    assert [layer.injected for layer in layers] == [False, True] * (len(layers) // 2)
    assert [layer.identity for layer in layers] == [layer.injected for layer in layers]
    assert all(layer.routed for layer in layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers)


def test_weights_of_optimums_graph_are_those_of_its_checkpoint():
    graph = open_foreign_graph(GRAPH)
    assert graph.config is not None
    assert graph.tensor_shapes() == graph.config.tensor_shapes()


@pytest.fixture
def alone(tmp_path):
    """The graph without a config.json."""
    (tmp_path / "alone").mkdir()
    return shutil.copy(GRAPH, tmp_path / "alone")


def test_parity_is_with_the_graphs_own_masked_form_when_there_is_no_config(alone, adapter, tmp_path):
    result = export_model(ExportRequest(str(alone), tmp_path / "out", adapter=adapter), Reporter())
    assert result.description.parity.verdict == "PASS", result.parity_summary
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["reference"] == "its own masked form"
    assert any("left-padded" in case["case"] for case in report["cases"])


def test_parity_says_why_it_cannot_run_when_there_is_neither_config_nor_another_form(alone, adapter, tmp_path):
    request = ExportRequest(str(alone), tmp_path / "out", adapter=adapter, lowering="masked")
    parity = export_model(request, Reporter()).description.parity
    assert parity.verdict == "NOT RUN"
    assert "config.json" in parity.reason
    assert "the masked graph would be compared with itself" in parity.reason


def test_whole_layers_are_skipped_as_pytorch_does_when_attention_is_causal_by_itself(tmp_path):
    path = save_foreign_graph(tmp_path / "graph", "fp32")
    proto = onnx.load(path, load_external_data=False)
    leave_later_tokens_to_attention(proto)
    onnx.save(proto, path)
    rng = np.random.default_rng(0)
    routers = {
        f"model.routers.{layer}.weight": ArrayTensor(rng.standard_normal((1, 32)).astype(np.float32))
        for layer in range(3)
    }
    save_adapter(DloAdapter("layer", (True,) * 3, tensors=routers), tmp_path / "adapter")
    request = ExportRequest(str(path), tmp_path / "out", adapter=tmp_path / "adapter", lowering="compact")
    result = export_model(request, Reporter())
    assert result.description.parity.verdict == "PASS", result.parity_summary
    assert "against PyTorch" in result.parity_summary


def test_graph_is_refused_when_its_activations_are_rounded_by_a_scale_that_tokens_share(adapter, tmp_path, capsys):
    shutil.copy(GRAPH.with_name("config.json"), tmp_path)
    quantize_dynamic(GRAPH, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"layer 0: DynamicQuantizeLinear node .* depends on the tokens beside it"):
        export_model(ExportRequest(str(tmp_path / "model.onnx"), tmp_path / "out", adapter=adapter), Reporter())
    assert not (tmp_path / "out").exists()
    app(["inspect", str(tmp_path / "model.onnx")], standalone_mode=False)
    assert "layers 0 to 2: attention spelled out" in " ".join(capsys.readouterr().out.split())


def test_embedding_is_found_when_it_is_scaled_before_the_first_layer(tmp_path):
    path = save_foreign_graph(tmp_path / "graph", "fp32")
    proto = onnx.load(path, load_external_data=False)
    (lookup,) = [node for node in proto.graph.node if node.op_type == "Gather" and "embed" in node.input[0]]
    scaled, lookup.output[0] = lookup.output[0], "looked_up"
    proto.graph.initializer.append(onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [12.0]))
    place = list(proto.graph.node).index(lookup) + 1
    proto.graph.node.insert(place, onnx.helper.make_node("Mul", ["looked_up", "factor"], [scaled]))
    onnx.save(proto, path)
    assert open_foreign_graph(path).tensors["model.embed_tokens.weight"].shape == (97, 32)


def test_graph_is_refused_when_external_weights_are_missing_or_short(tmp_path):
    model = ir.load(GRAPH)
    ir.save(model, tmp_path / "model.onnx", external_data="weights")
    (tmp_path / "weights").write_bytes((tmp_path / "weights").read_bytes()[:-10])
    with pytest.raises(InputError, match=r"weights, which has \d+ bytes"):
        open_foreign_graph(tmp_path / "model.onnx")
    (tmp_path / "weights").unlink()
    with pytest.raises(InputError, match="weights: no such file"):
        open_foreign_graph(tmp_path / "model.onnx")


def test_graph_is_refused_when_it_is_no_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises((InputError, DecoderLayersNotFound)):
        open_foreign_graph(tmp_path / "model.onnx")


def test_graph_is_deepened_when_its_cache_is_listed_in_another_order(adapter, tmp_path):
    shutil.copytree(GRAPH.parent, tmp_path / "model")
    model = ir.load(GRAPH)
    for interface in (model.graph.inputs, model.graph.outputs):
        interface[:] = sorted(interface, key=lambda value: value.name[::-1])
    ir.save(model, tmp_path / "model" / "model.onnx")
    request = ExportRequest(str(tmp_path / "model" / "model.onnx"), tmp_path / "out", adapter=adapter)
    result = export_model(request, Reporter())
    assert result.description.parity.verdict == "PASS", result.parity_summary


def test_adapter_is_refused_when_it_is_for_another_model(tmp_path):
    hidden = 8
    tensors = {"model.routers.0.weight": ArrayTensor(np.zeros((1, hidden), np.float32))}
    save_adapter(DloAdapter("mlp", (True,), injected_layers=(), tensors=tensors), tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit the model"):
        export_model(ExportRequest(str(GRAPH), tmp_path / "out", adapter=tmp_path / "adapter"), Reporter())


def test_tokenizer_model_is_converted_when_it_stands_alone_beside_the_graph(tmp_path):
    shutil.copytree(GRAPH.parent, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink(missing_ok=True)
    model = train_sentencepiece(tmp_path / "model")
    graph = open_foreign_graph(tmp_path / "model" / GRAPH.name)
    assert graph.warnings == ()
    (tmp_path / "out").mkdir()
    graph.save_companions(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("Hello  world").ids == [model.bos_id(), *model.encode("Hello  world")]
