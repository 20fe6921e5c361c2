"""Engines really built by TensorRT-RTX, in the subprocess a user's builds run in."""

import dataclasses
import functools
import hashlib
import io
import json

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from dlo_export.checkpoints.errors import EngineBuildError, InputError
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.engines import build_engine, build_engines
from dlo_export.exporter.tensorrt.export import optimization_profiles
from dlo_export.plugins.contract import SIZES_HINT
from dlo_export.runtimes.artefact.engine_record import EngineBuild
from dlo_export.runtimes.artefact.typed_json import from_json, to_json
from tests.exporter.tiny_engines import FILES, node, plan, save_request


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
    profiles = optimization_profiles(plan(lowering, 3, dtype).engines[0])
    asked = save_request(tmp_path, lowering, 3, dtype, targets=targets, profiles=profiles)
    build = build_engine(asked, Reporter())
    engine = asked.output.read_bytes()
    assert (build.bytes, build.sha256) == (len(engine), hashlib.sha256(engine).hexdigest())
    assert [stage.name for stage in build.stages] == ["import", "parse", "checks", "build", "write"]
    assert all(stage.seconds > 0 and stage.peak_bytes > 10 * 2**20 for stage in build.stages)
    assert build.peak_bytes == max(stage.peak_bytes for stage in build.stages)
    assert (build.backend, build.targets) == ("rtx", targets)
    assert build.decomposed_attentions == 3
    assert build.plugins == ("twins" if lowering == "plugin" else "none")
    assert set(build.census.skipping) == (set() if lowering == "none" else {0, 1, 2})
    assert build.census.total["KV_CACHE_UPDATE"] == 6
    assert not build.from_cache
    assert files(tmp_path) == ["engines/model.engine", *FILES]


def test_engine_build_survives_json(tmp_path):
    build = build_engine(save_request(tmp_path), Reporter())
    assert from_json(EngineBuild, json.loads(json.dumps(to_json(build, tmp_path))), tmp_path) == build


def test_build_engine_fails_when_a_data_file_is_missing(tmp_path):
    asked = save_request(tmp_path, "none")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"its data file model.onnx.data does not exist"):
        build_engine(asked, Reporter())


def test_build_engine_fails_when_graph_is_not_onnx(tmp_path):
    asked = save_request(tmp_path, "none")
    asked.graph.write_bytes(b"no graph")
    with pytest.raises(InputError, match="is not an ONNX graph"):
        build_engine(asked, Reporter())


def unsupported(model):
    node(model, "model.layers.0.mlp.gate_sigmoid").op_type = "Unique"


def unknown_plugin(model):
    changed = node(model, "model.layers.0.mlp.gate_sigmoid")
    changed.op_type, changed.domain = "SkipEverything", "dlo"
    model.opset_imports["dlo"] = 1


def mistyped(model):
    set_weight(model, "model.layers.0.mlp.up_proj.weight", lambda values: values.astype(np.float16))


def set_weight(model, name, change):
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(change(value.const_value.numpy()), name=name)
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unsupported, r"node 'model.layers.0.mlp.gate_sigmoid' \(Unique\) of decoder layer 0: unsupported node"),
        (
            unknown_plugin,
            r"node 'model.layers.0.mlp.gate_sigmoid' \(SkipEverything\) of decoder layer 0: .*Plugin not found",
        ),
        (
            mistyped,
            r"node 'model.layers.0.mlp.up_proj' \(MatMul\) of decoder layer 0: .*`A` is of type BFloat16 and `B`",
        ),
    ],
    ids=["unsupported-op", "unknown-plugin", "dtype-mismatch"],
)
def test_build_engine_names_node_and_layer_when_parser_refuses(tmp_path, change, said):
    with pytest.raises(EngineBuildError, match=said) as caught:
        build_engine(save_request(tmp_path, "none", change=change), Reporter())
    text = str(caught.value)
    assert text.startswith("model.onnx: TensorRT-RTX cannot parse the graph:")
    assert "\n\nhint: " in text
    assert "cudaError" not in text
    assert "/_src/" not in text
    assert caught.value.exit_code == 3
    assert files(tmp_path) == FILES


def test_build_engine_names_node_and_layer_when_builder_refuses(tmp_path):
    def select_too_many(model):
        many = ir.Value(name="too_many", const_value=ir.tensor(np.array([5000], np.int64), name="too_many"))
        model.graph.initializers["too_many"] = many
        node(model, "model.routers.0.topk").replace_input_with(1, many)

    with pytest.raises(
        EngineBuildError, match=r"model.routers.0.topk.* exceeds .*3840.* \(decoder layer 0\)"
    ) as caught:
        build_engine(save_request(tmp_path, change=select_too_many), Reporter())
    assert "hint: a TopK selects 3840 at most" in str(caught.value)
    assert files(tmp_path) == FILES


def test_build_engine_lists_all_problems_when_network_is_not_what_was_meant(tmp_path):
    def unmask(model):
        node(model, "model.layers.0.self_attn.attention_heads").replace_input_with(3, None)

    asked = save_request(tmp_path, "none", change=unmask, routed_layers=(0,))
    asked = dataclasses.replace(asked, lowering="compact")
    with pytest.raises(EngineBuildError) as caught:
        build_engine(asked, Reporter())
    text = str(caught.value)
    assert "no output depends on input 'kv_lengths'" in text
    assert "attention 'model.layers.0.self_attn.attention_heads' has no mask" in text
    assert "decoder layer 0 is routed and does not skip" in text
    assert files(tmp_path) == FILES


def test_build_engine_lists_all_problems_when_profiles_do_not_fit_the_graph(tmp_path):
    asked = save_request(tmp_path, "none")
    (profile,) = asked.profiles
    shapes = dict(profile.shapes) | {"elsewhere": ((1,), (1,), (1,))}
    del shapes["kv_lengths"]
    upside_down = {name: (most, most, least) for name, (least, _, most) in profile.shapes.items()}
    wrong = (
        dataclasses.replace(profile, name="decode", shapes=shapes),
        dataclasses.replace(profile, shapes=upside_down),
    )
    with pytest.raises(EngineBuildError) as caught:
        build_engine(dataclasses.replace(asked, profiles=wrong), Reporter())
    text = str(caught.value)
    assert "profile 'decode' has no shapes for input 'kv_lengths'" in text
    assert "profile 'decode' has shapes for 'elsewhere', which is no input" in text
    assert "profile 'prefill' was refused" in text


def test_build_engine_fails_when_plugin_library_is_missing(tmp_path):
    asked = save_request(tmp_path, "plugin", plugin_library=tmp_path / "libdlo_plugins.so")
    with pytest.raises(EngineBuildError, match="no such file") as caught:
        build_engine(asked, Reporter())
    assert caught.value.exit_code == 3


def test_build_engine_fails_when_plugin_library_is_none(tmp_path):
    library = tmp_path / "libdlo_plugins.so"
    library.write_bytes(b"\x7fELF no library\0getCreators\0")
    asked = save_request(tmp_path, "plugin", plugin_library=library)
    with pytest.raises(EngineBuildError, match="could not load it"):
        build_engine(asked, Reporter())
    assert files(tmp_path) == ["libdlo_plugins.so", *FILES]


def test_build_engine_fails_when_target_is_unknown(tmp_path):
    asked = save_request(tmp_path, "none", targets=("sm90", "sm89"))
    with pytest.raises(InputError, match="cannot build for sm90: it builds for sm75, sm80, sm86, sm89, sm120, sm121"):
        build_engine(asked, Reporter())


def test_build_engine_says_what_a_plugin_refused_when_its_sizes_do_not_fit(tmp_path):
    def narrow(model):
        for part, axis in (("gate", 1), ("up", 1), ("down", 0)):
            name = f"model.layers.0.mlp.{part}_proj.weight"
            set_weight(model, name, functools.partial(np.take, indices=range(90), axis=axis))

    with pytest.raises(EngineBuildError, match="intermediate 90; expected a multiple of 8") as caught:
        build_engine(save_request(tmp_path, "plugin", change=narrow), Reporter())
    text = str(caught.value)
    assert "node 'model.layers.0.mlp.skip_gate_up' (SkipGateUp) of decoder layer 0" in text
    assert text.endswith(f"hint: {SIZES_HINT}")


def test_build_engine_shows_a_bar_and_stages_when_on_a_terminal(tmp_path):
    reporter = Reporter(verbose=True)
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    build_engine(save_request(tmp_path), reporter)
    shown = reporter.console.file.getvalue()
    assert "━" in shown
    for stage in ("import", "parse", "checks", "build", "write"):
        assert f"engine model.engine: {stage}: " in shown


def test_build_engines_builds_side_by_side_when_several_are_asked_for(tmp_path):
    asked = []
    for name in ("prefill", "decode"):
        (tmp_path / name).mkdir()
        asked.append(save_request(tmp_path / name))
    builds = build_engines(asked, Reporter(), jobs=2)
    assert all(each.output.stat().st_size == build.bytes for each, build in zip(asked, builds, strict=True))
