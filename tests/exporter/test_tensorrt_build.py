"""Engines really built by TensorRT-RTX, in the subprocess a user's builds run in."""

import dataclasses
import hashlib
import io
import json

import onnx
import onnx_ir as ir
import pytest
from dlo_export.exporter.tensorrt.engine_record import EngineRecord
from rich.console import Console

from dlo_export.checkpoints.errors import EngineBuildError, InputError
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.engines import build_engine, build_engines
from dlo_export.exporter.weight_file import save_weights
from tests.exporter.engine_graphs import Tiny, profiles, request


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def move_weights(graph):
    """To a data file beside the graph, as artefacts have them."""
    model = ir.load(graph)
    save_weights(model, graph.with_name("model.onnx.data"))
    ir.save(model, graph)


@pytest.mark.parametrize(
    ("lowering", "dtype", "targets"),
    [
        ("none", "bf16", ("sm89",)),
        ("compact", "fp16", ("sm89", "sm120")),
        ("compact", "fp32", ("sm86",)),
        ("compact", "fp16", ("sm75",)),
        ("if", "bf16", ()),
        ("plugin", "fp16", ("sm80", "sm121")),
    ],
)
def test_build_engine_describes_what_it_built(tmp_path, lowering, dtype, targets):
    tiny = Tiny(lowering, layers=3, dtype=dtype)
    asked = request(tmp_path, tiny, targets=targets, profiles=profiles(tiny.model()))
    record = build_engine(asked, Reporter())
    engine = asked.output.read_bytes()
    assert (record.bytes, record.sha256) == (len(engine), hashlib.sha256(engine).hexdigest())
    assert record.graph_sha256 == hashlib.sha256(asked.graph.read_bytes()).hexdigest()
    assert [stage.name for stage in record.stages] == ["import", "parse", "checks", "build", "write"]
    assert all(stage.seconds > 0 and stage.peak_bytes > 10 * 2**20 for stage in record.stages)
    assert record.peak_bytes == max(stage.peak_bytes for stage in record.stages)
    assert (record.targets, record.profiles) == (targets, asked.profiles)
    assert record.decomposed_attentions == 3
    assert record.plugins == ("twins" if lowering == "plugin" else "none")
    assert set(record.census.skipping) == (set() if lowering == "none" else {0, 1, 2})
    assert record.census.total["KV_CACHE_UPDATE"] == 6
    assert not record.from_cache
    assert files(tmp_path) == ["engines/model.engine", "model.onnx"]


def test_engine_record_survives_json_when_folder_is_given(tmp_path):
    record = build_engine(request(tmp_path, Tiny("compact", layers=1)), Reporter())
    values = json.loads(json.dumps(record.to_json(tmp_path)))
    assert (values["file"], values["graph"]) == ("engines/model.engine", "model.onnx")
    assert EngineRecord.from_json(values | {"interface": {}}, tmp_path) == record


def test_build_engine_uses_weights_when_they_lie_beside_the_graph(tmp_path):
    tiny = Tiny("none", layers=1)
    asked = request(tmp_path, tiny)
    move_weights(asked.graph)
    record = build_engine(asked, Reporter())
    data = (tmp_path / "model.onnx.data").read_bytes()
    assert record.weights_sha256 == {"model.onnx.data": hashlib.sha256(data).hexdigest()}


def test_build_engine_fails_when_a_data_file_is_missing(tmp_path):
    asked = request(tmp_path, Tiny("none", layers=1))
    move_weights(asked.graph)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"its data file model.onnx.data does not exist"):
        build_engine(asked, Reporter())


def test_build_engine_fails_when_graph_is_not_onnx(tmp_path):
    asked = request(tmp_path, Tiny("none", layers=1))
    asked.graph.write_bytes(b"no graph")
    with pytest.raises(InputError, match="is not an ONNX graph"):
        build_engine(asked, Reporter())


def broken(tmp_path, change):
    """A request for a graph of one dense layer, changed."""
    tiny = Tiny("none", layers=1)
    model = tiny.model()
    change({node.name: node for node in model.graph.node}, model)
    return request(tmp_path, tiny, model)


def unsupported(nodes, model):
    nodes["model.layers.0.mlp.silu"].op_type = "Unique"


def unknown_plugin(nodes, model):
    nodes["model.layers.0.mlp.silu"].op_type = "SkipEverything"
    nodes["model.layers.0.mlp.silu"].domain = "dlo"
    model.opset_import.append(onnx.helper.make_opsetid("dlo", 1))


def mistyped(nodes, model):
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "model.layers.0.mlp.up.weight")
    values = onnx.numpy_helper.to_array(weight).astype("float16")
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unsupported, r"node 'model.layers.0.mlp.silu' \(Unique\) of decoder layer 0: unsupported node"),
        (unknown_plugin, r"node 'model.layers.0.mlp.silu' \(SkipEverything\) of decoder layer 0: .*Plugin not found"),
        (
            mistyped,
            r"node 'model.layers.0.mlp.up' \(MatMul\) of decoder layer 0: .*`A` is of type BFloat16 and `B`",
        ),
    ],
    ids=["unsupported-op", "unknown-plugin", "dtype-mismatch"],
)
def test_build_engine_names_node_and_layer_when_parser_refuses(tmp_path, change, said):
    with pytest.raises(EngineBuildError, match=said) as caught:
        build_engine(broken(tmp_path, change), Reporter())
    text = str(caught.value)
    assert text.startswith("model.onnx: TensorRT-RTX cannot parse the graph:")
    assert "\n\nhint: " in text
    assert "cudaError" not in text
    assert "/_src/" not in text
    assert caught.value.exit_code == 3
    assert files(tmp_path) == ["model.onnx"]


def test_build_engine_names_node_and_layer_when_builder_refuses(tmp_path):
    tiny = Tiny("compact", layers=1)
    model = tiny.model()
    topk = next(node for node in model.graph.node if node.op_type == "TopK")
    model.graph.initializer.append(onnx.helper.make_tensor("too_many", onnx.TensorProto.INT64, [1], [5000]))
    topk.input[1] = "too_many"
    with pytest.raises(
        EngineBuildError, match=r"model.routers.0.topk.* exceeds .*3840.* \(decoder layer 0\)"
    ) as caught:
        build_engine(request(tmp_path, tiny, model), Reporter())
    assert "hint: a TopK selects 3840 at most" in str(caught.value)
    assert files(tmp_path) == ["model.onnx"]


def test_build_engine_lists_all_problems_when_network_is_not_what_was_meant(tmp_path):
    tiny = Tiny("none", layers=1)
    asked = request(tmp_path, tiny, tiny.model(with_mask=False), lowering="compact", routed_layers=(0,))
    with pytest.raises(EngineBuildError) as caught:
        build_engine(asked, Reporter())
    text = str(caught.value)
    assert "no output depends on input 'mask'" in text
    assert "attention 'model.layers.0.self_attn.attention' has no mask" in text
    assert "decoder layer 0 is routed and does not skip" in text
    assert files(tmp_path) == ["model.onnx"]


def test_build_engine_lists_all_problems_when_profiles_do_not_fit_the_graph(tmp_path):
    asked = request(tmp_path, Tiny("none", layers=1))
    (profile,) = asked.profiles
    shapes = dict(profile.shapes) | {"elsewhere": ((1,), (1,), (1,))}
    del shapes["mask"]
    upside_down = {name: (most, most, least) for name, (least, _, most) in profile.shapes.items()}
    wrong = (
        dataclasses.replace(profile, name="decode", shapes=shapes),
        dataclasses.replace(profile, shapes=upside_down),
    )
    with pytest.raises(EngineBuildError) as caught:
        build_engine(dataclasses.replace(asked, profiles=wrong), Reporter())
    text = str(caught.value)
    assert "profile 'decode' has no shapes for input 'mask'" in text
    assert "profile 'decode' has shapes for 'elsewhere', which is no input" in text
    assert "profile 'prefill' was refused" in text


def test_build_engine_fails_when_plugin_library_is_missing(tmp_path):
    asked = request(tmp_path, Tiny("plugin", layers=1), plugin_library=tmp_path / "libdlo_plugins.so")
    with pytest.raises(EngineBuildError, match="no such file") as caught:
        build_engine(asked, Reporter())
    assert caught.value.exit_code == 3


def test_build_engine_fails_when_plugin_library_is_none(tmp_path):
    library = tmp_path / "libdlo_plugins.so"
    library.write_bytes(b"\x7fELF no library")
    asked = request(tmp_path, Tiny("plugin", layers=1), plugin_library=library)
    with pytest.raises(EngineBuildError, match="could not load it"):
        build_engine(asked, Reporter())
    assert files(tmp_path) == ["libdlo_plugins.so", "model.onnx"]


def test_build_engine_fails_when_target_is_unknown(tmp_path):
    asked = request(tmp_path, Tiny("none", layers=1), targets=("sm90", "sm89"))
    with pytest.raises(InputError, match="cannot build for sm90: it builds for sm75, sm80, sm86, sm89, sm120, sm121"):
        build_engine(asked, Reporter())


def test_build_engine_says_what_a_plugin_refused_when_its_sizes_do_not_fit(tmp_path):
    tiny = Tiny("plugin", layers=1)
    model = tiny.model()
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("gate.weight", "up.weight", "down.weight")):
            axis = 0 if "down" in tensor.name else 1
            values = onnx.numpy_helper.to_array(tensor).take(range(90), axis)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(EngineBuildError, match="intermediate 90; expected a multiple of 8") as caught:
        build_engine(request(tmp_path, tiny, model), Reporter())
    text = str(caught.value)
    assert "node 'model.layers.0.mlp.skip_gate_up' (SkipGateUp) of decoder layer 0" in text
    assert text.endswith("hint: use another lowering for this model: compact or if")


def test_build_engine_shows_a_bar_and_stages_when_on_a_terminal(tmp_path):
    reporter = Reporter(verbose=True)
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    build_engine(request(tmp_path, Tiny("compact", layers=1)), reporter)
    shown = reporter.console.file.getvalue()
    assert "━" in shown
    for stage in ("import", "parse", "checks", "build", "write"):
        assert f"engine model.engine: {stage}: " in shown


def test_build_engines_builds_side_by_side_when_several_are_asked_for(tmp_path):
    asked = []
    for name in ("prefill", "decode"):
        (tmp_path / name).mkdir()
        asked.append(request(tmp_path / name, Tiny("compact", layers=1)))
    records = build_engines(asked, Reporter(), jobs=2)
    assert [record.file for record in records] == [each.output for each in asked]
    assert all(each.output.stat().st_size == record.bytes for each, record in zip(asked, records, strict=True))
