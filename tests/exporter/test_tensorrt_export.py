"""`dlo-export --trt` as a user runs it: engines built by TensorRT-RTX, or a reason before anything starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file

from dlo_export.exporter.exit_codes import BUILD_FAILED, DONE, MACHINE
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.tensorrt.gpu import find_gpu
from tests.exporter.forked_commands import run as dlo
from tests.exporter.test_cli import check_refused
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

DATA = Path(__file__).parents[1] / "data"
REFERENCE = DATA / "reference_mlp_routed"
ROUTED_LAYERS = [0, 1, 3]
MECHANISM = {"compact": "TOPK", "if": "CONDITION", "plugin": "PLUGIN_V3"}


@pytest.fixture(autouse=True)
def engine_cache(tmp_path_factory, monkeypatch):
    """No engine of another run."""
    monkeypatch.setenv("DLO_EXPORT_CACHE", str(tmp_path_factory.mktemp("engines")))


def description_of(folder):
    return load_description(folder)


@pytest.mark.parametrize("lowering", MECHANISM)
def test_export_builds_an_engine_that_skips_in_every_routed_layer(tmp_path, lowering):
    out = tmp_path / "out"
    options = ["--trt", "--trt-target", "sm89,sm120", "--lowering", lowering, "--trt-max-cache", "64"]
    result = dlo("export", REFERENCE, "-o", out, *options, "--trt-max-sequence", "32")
    assert result.returncode == DONE, result.stderr
    assert f"trt {lowering}" in result.stdout, "parity compares the graph's twin"
    (engine,) = description_of(out).engines
    assert engine.file.stat().st_size == engine.build.bytes
    assert (engine.build.backend, engine.build.targets, engine.lowering) == ("rtx", ("sm89", "sm120"), lowering)
    assert engine.dtype == "bf16"
    assert {layer: MECHANISM[lowering] in types for layer, types in engine.build.census.skipping.items()} == (
        dict.fromkeys(ROUTED_LAYERS, True)
    )
    assert [profile.name for profile in engine.profiles] == ["prefill", "decode"]
    assert engine.parity.verdict == "NOT RUN"
    names = [spec.name for spec in engine.interface.inputs]
    assert names[:4] == ["input_ids", "position_ids", "write_indices", "kv_lengths"]
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert model.graph.input[3].type.tensor_type.elem_type == onnx.TensorProto.FLOAT, "model.onnx stays fp32"
    assert not list(out.glob("**/*.partial"))


def test_export_cuts_paritys_cases_to_the_cache_when_the_graph_is_masked(tmp_path):
    out = tmp_path / "out"
    sizes = ["--trt-max-batch", "3", "--trt-max-sequence", "16", "--trt-max-cache", "20"]
    result = dlo("export", REFERENCE, "-o", out, "--trt", "--lowering", "masked", *sizes)
    assert result.returncode == DONE, result.stderr
    assert "warning: --trt-max-cache is below 56: parity's cases are cut to fit" in result.stderr
    description = description_of(out)
    (engine,) = description.engines
    assert (description.lowering, engine.lowering, engine.max_cache) == ("masked", "masked", 20)
    assert not any(engine.build.census.skipping.values()), "a masked layer has no skip mechanism"
    assert engine.file.stat().st_size == engine.build.bytes
    report = json.loads((out / "parity.json").read_text())
    assert (report["verdict"], description.parity.verdict) == ("PASS", "PASS")
    # A static cache refuses a token more: that they all ran is what says that they fit.
    cases = [case for case in report["cases"] if case["candidate"] == "trt masked"]
    assert {case["verdict"] for case in cases} == {"PASS"}
    assert {"prefill", "left-padded batch with a cache", "mixed decisions"} <= {case["case"] for case in cases}
    (greedy,) = [run for run in report["greedy"] if run["candidate"] == "trt masked"]
    assert greedy["identical"] > 0


def test_export_builds_two_engines_on_one_weight_file_when_split(tmp_path):
    out = tmp_path / "out"
    options = ["--trt", "--trt-split", "--trt-last-logits", "--trt-max-batch", "1", "--no-parity"]
    result = dlo("export", REFERENCE, "-o", out, *options)
    assert result.returncode == DONE, result.stderr
    assert "so the second one costs" in result.stdout
    engines = description_of(out).engines
    assert [(e.phase, e.lowering, [p.name for p in e.profiles]) for e in engines] == [
        ("prefill", "compact", ["prefill"]),
        ("decode", "if", ["decode"]),
    ]
    assert sorted(path.name for path in (out / "engines").iterdir()) == [
        "decode.engine",
        "decode.onnx",
        "model.onnx.data",
        "prefill.engine",
        "prefill.onnx",
    ]
    (logits,) = [spec for spec in engines[0].interface.outputs if spec.name == "logits"]
    assert logits.shape[1] == 1


def test_split_engines_share_a_weight_file_when_only_prefill_needs_chunks(tmp_path):
    options = ["--trt", "--trt-split", "--trt-max-sequence", "2048", "--trt-max-batch", "2", "--no-parity"]
    result = dlo("export", REFERENCE, "-o", tmp_path / "out", *options)
    assert result.returncode == DONE, result.stderr
    prefill, decode = (onnx.load(engine.graph) for engine in description_of(tmp_path / "out").engines)
    assert [sum(node.op_type == "TopK" for node in graph.graph.node) for graph in (prefill, decode)] == [6, 3]
    weights = {tensor.name: tensor.raw_data for tensor in prefill.graph.initializer}
    assert {tensor.name: tensor.raw_data for tensor in decode.graph.initializer}.items() <= weights.items()


@pytest.mark.parametrize("lowering", ["auto", "plugin"])
def test_export_builds_an_engine_with_a_growing_cache_when_asked(tmp_path, lowering):
    options = ["--trt", "--trt-cache", "growing", "--dtype", "fp16", "--lowering", lowering, "--no-parity"]
    sizes = ["--trt-max-cache", "64", "--trt-max-sequence", "32"]
    result = dlo("export", REFERENCE, "-o", tmp_path / "out", *options, *sizes)
    assert result.returncode == DONE, result.stderr
    (engine,) = description_of(tmp_path / "out").engines
    assert (engine.cache, engine.dtype) == ("growing", "fp16")
    assert engine.profiles[1].shapes["past_key_values.0.key"][2][2] == 63


def test_export_builds_a_dense_engine_when_nothing_is_routed(tmp_path):
    checkpoint = save_tiny_llama(tmp_path / "model", dtype="float16")
    result = dlo("export", checkpoint, "-o", tmp_path / "out", "--trt", "--no-parity")
    assert result.returncode == DONE, result.stderr
    (engine,) = description_of(tmp_path / "out").engines
    assert (engine.lowering, engine.dtype) == ("none", "fp16"), "auto keeps the checkpoint's 16-bit type"


def test_second_export_takes_the_engine_from_the_cache_and_says_so(tmp_path):
    for folder, cached in (("first", False), ("second", True)):
        assert dlo("export", REFERENCE, "-o", tmp_path / folder, "--trt", "--no-parity").returncode == DONE
        (engine,) = description_of(tmp_path / folder).engines
        assert engine.build.from_cache == cached


REFUSED = {
    "layer_routing_growing": (
        DATA / "reference_layer_routed",
        ["--trt", "--trt-cache", "growing"],
        "--trt-cache static",
    ),
    "no_routers": (None, ["--trt", "--lowering", "plugin"], "no routers"),
    "options_without_trt": (REFERENCE, ["--trt-target", "sm89"], "--trt is not given"),
    "zero_batch": (REFERENCE, ["--trt", "--trt-max-batch", "0"], "'--trt-max-batch'"),
    "cache_too_small": (REFERENCE, ["--trt", "--trt-max-cache", "16"], "does not fit --trt-max-cache 16"),
    "last_logits_growing": (REFERENCE, ["--trt", "--trt-cache", "growing", "--trt-last-logits"], "--trt-cache static"),
    "target_of_commas": (REFERENCE, ["--trt", "--trt-target", " ,"], "--trt-target ' ,': names no GPU"),
    "unknown_target": (REFERENCE, ["--trt", "--trt-target", "sm42"], "sm42"),
    "no_library": (REFERENCE, ["--trt", "--trt-plugin-library", "nowhere.so"], "nowhere.so: no such file"),
    "folder_for_library": (REFERENCE, ["--trt", "--trt-plugin-library", str(REFERENCE)], "is a folder; expected"),
    "no_plugins": (
        REFERENCE,
        ["--trt", "--trt-plugin-library", str(Path(REFERENCE) / "config.json")],
        "config.json: has no getCreators",
    ),
}


@pytest.mark.parametrize(("model", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_export_refuses_before_anything_is_built_when(tmp_path, model, options, reason):
    model = model or save_tiny_llama(tmp_path / "model")
    check_refused(dlo("export", model, "-o", tmp_path / "out", *options), tmp_path, reason)


def test_export_refuses_someone_elses_graph_when_engines_are_asked_for_and_no_config_lies_beside_it(tmp_path):
    graph = shutil.copy(DATA / "optimum_llama" / "model.onnx", tmp_path)
    result = dlo("export", graph, "-o", tmp_path / "out", "--trt")
    check_refused(result, tmp_path, "model.onnx: no config.json lies beside the graph", "hint: put the config")


def test_run_says_what_is_missing_when_there_is_no_gpu(tmp_path):
    model = save_tiny_llama(tmp_path / "model", tokenizer=True, vocab=BYTE_VOCABULARY, routed=[True] * 3)
    assert dlo("export", model, "-o", tmp_path / "art", "--trt", "--no-parity").returncode == DONE
    if find_gpu().target is not None:
        pytest.skip("this machine has a GPU")
    result = dlo("run", tmp_path / "art", "hello", "--trt")
    assert result.returncode == MACHINE, result.stderr
    assert "GPU" in result.stderr
    assert "hint:" in result.stderr


@pytest.mark.parametrize(
    ("weight", "largest", "expected"),
    [
        # Norms undo the factor at once, so nothing but the stream grows.
        ("embed_tokens", 2, "recorded"),
        ("embed_tokens", 4e4, "warned"),
        # A weight that fp16 holds, times as many inputs as the MLP has.
        ("layers.0.mlp.down_proj", 6e4, "refused"),
    ],
)
def test_export_measures_the_stream_when_engines_are_in_fp16(tmp_path, weight, largest, expected):
    model = save_tiny_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensor = tensors[f"model.{weight}.weight"]
    tensor *= largest / float(tensor.abs().max())
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = dlo("export", model, "-o", tmp_path / "out", "--trt", "--dtype", "fp16")
    if expected == "refused":
        check_refused(result, tmp_path, "--dtype fp16: the residual stream reaches", "bf16")
        return
    assert result.returncode == DONE, result.stderr
    assert ("bf16 is safer" in result.stderr) == (expected == "warned")
    (engine,) = description_of(tmp_path / "out").engines
    assert largest / 2 < engine.float16_stream_peak < 65504


def test_export_explains_what_plugins_cannot_compute_when_the_mlp_has_biases(tmp_path):
    model = save_tiny_llama(tmp_path / "model", mlp_bias=True, routed=[True] * 3)
    result = dlo("export", model, "-o", tmp_path / "out", "--trt", "--lowering", "plugin")
    check_refused(result, tmp_path, "without biases")
    result = dlo("export", model, "-o", tmp_path / "out", "--trt", "--lowering", "compact", "--no-parity")
    assert result.returncode == DONE, result.stderr


def test_export_names_the_size_when_plugins_do_not_take_it(tmp_path):
    model = save_tiny_llama(tmp_path / "model", intermediate=52, routed=[True] * 3)
    result = dlo("export", model, "-o", tmp_path / "out", "--trt", "--lowering", "plugin")
    check_refused(
        result, tmp_path, "kernels of --lowering plugin do not take intermediate_size 52", "--lowering if or compact"
    )


def test_export_leaves_nothing_behind_when_a_build_takes_too_long(tmp_path):
    result = dlo("export", REFERENCE, "-o", tmp_path / "out", "--trt", "--trt-timeout", "0.05", "--no-parity")
    assert result.returncode == BUILD_FAILED, result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_plain_export_loads_no_tensorrt(tmp_path):
    code = (
        "import sys; from dlo_export.exporter.export import ExportRequest, export_model;"
        "from dlo_export.exporter.progress import Reporter;"
        "from pathlib import Path;"
        f"export_model(ExportRequest({str(REFERENCE)!r}, Path({str(tmp_path)!r}) / 'out', parity=False), Reporter());"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'tensorrt_rtx', 'tensorrt', 'triton')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
