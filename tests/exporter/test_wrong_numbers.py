"""Weights that are no numbers, or too large for their type, are refused by name on every way a model comes in."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from dlo_export.checkpoints.adapter.adapter import AdapterError, DloAdapter, InjectedLayer, save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.finite_weights import NonFiniteWeightError, all_finite, check_finite
from dlo_export.checkpoints.formats.safetensors_writer import save_safetensors
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE, PARITY_FAILED
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.inspection import inspect_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.graph_passes.checkpoint_weight import WeightOverflowError
from tests.exporter.forked_commands import run as dlo
from tests.exporter.test_cli import check_refused
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

UP = "model.layers.1.mlp.up_proj.weight"
# No token of parity's cases reads this row of the embedding.
UNREAD = ("model.embed_tokens.weight", (96, 5))


def spoil(model: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    tensors = load_file(model / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1, 7, (1 << 16) + 3])
def test_every_bit_pattern_that_is_no_number_is_found_and_no_other(dtype: type, size: int) -> None:
    info = ml_dtypes.finfo(dtype)
    numbers = np.resize(np.array([0.0, -0.0, info.max, -info.max, info.tiny, -1.5], dtype), size)
    assert all_finite(numbers)
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    signalling = (np.array(np.inf, dtype).view(bits) + 1).view(dtype)[()]
    for wrong in (np.inf, -np.inf, np.nan, -np.nan, signalling):
        for place in {0, size // 2, size - 1}:
            spoiled = numbers.copy()
            spoiled[place] = wrong
            assert not all_finite(spoiled)
    assert all_finite(numbers[:0])
    assert all_finite(np.arange(3))


def test_first_place_is_named_when_rows_of_a_transposed_array_are_looked_at() -> None:
    values = np.zeros((4, 6), np.float16).T
    values[2, 3] = -np.inf
    with pytest.raises(NonFiniteWeightError, match=r"file: w\[12, 3\] is -inf, expected finite numbers"):
        check_finite(values, "w", "file", first_row=10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoint_is_refused_when_a_row_that_no_token_reads_is_not_finite(
    tmp_path: Path, dtype: str, value: float
) -> None:
    name, index = UNREAD
    model = spoil(save_tiny_llama(tmp_path / "model", dtype=dtype), name, index, value)
    with pytest.raises(NonFiniteWeightError, match=rf"model: {name}\[96, 5\] is {value}"):
        export_model(ExportRequest(str(model), tmp_path / "out", parity=False), Reporter())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["export", "export --no-parity", "expand --every 1", "expand --every 1 --adapter"])
def test_commands_refuse_a_checkpoint_by_tensor_when_it_holds_nan(tmp_path: Path, command: str) -> None:
    model = spoil(save_tiny_llama(tmp_path / "model"), UP, (3, 4), float("nan"))
    result = dlo(*command.split(), model, "-o", tmp_path / "out")
    check_refused(result, tmp_path, f"{UP}[3, 4] is nan")
    # A hint names an option only where the command has it.
    assert ("; --allow-nonfinite takes it as it is" in result.stderr) is command.startswith("export")


def test_parity_names_the_option_when_the_model_holds_nan(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    export_model(ExportRequest(str(model), tmp_path / "artefact", parity=False), Reporter())
    spoil(model, UP, (3, 4), float("nan"))
    result = dlo("parity", tmp_path / "artefact", model)
    check_refused(result, tmp_path, f"{UP}[3, 4] is nan", "; --allow-nonfinite takes it as it is")
    result = dlo("parity", tmp_path / "artefact", model, "--allow-nonfinite", "--json")
    assert result.returncode == PARITY_FAILED, result.stderr
    assert json.loads(result.stdout, parse_constant=pytest.fail)["verdict"] == "FAIL"


@pytest.mark.parametrize("command", ["calibrate", "train"])
def test_fitting_refuses_a_checkpoint_by_tensor_when_it_holds_nan(tmp_path: Path, command: str) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, tokenizer=True)
    spoil(model, UP, (3, 4), float("nan"))
    (tmp_path / "texts").mkdir()
    for name in ("1.txt", "2.txt"):
        (tmp_path / "texts" / name).write_text("Numbers that are none.\n\n" * 100)
    options = {
        "calibrate": ["--text", tmp_path / "texts", "--tokens", 512, "--evaluation-tokens", 512],
        "train": ["--data", tmp_path / "texts", "--routers", "add"],
    }
    result = dlo(command, model, "-o", tmp_path / "out", *options[command])
    check_refused(result, tmp_path, f"{UP}[3, 4] is nan")
    assert "allow-nonfinite" not in result.stderr


def test_checkpoint_is_exported_when_values_that_are_no_numbers_are_allowed(tmp_path: Path) -> None:
    name, index = UNREAD
    model = spoil(save_tiny_llama(tmp_path / "model"), name, index, float("nan"))
    result = dlo("export", model, "-o", tmp_path / "out", "--no-parity", "--allow-nonfinite")
    assert result.returncode == DONE, result.stderr


def test_gguf_is_refused_when_a_dequantised_value_is_not_finite(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", hidden=64, intermediate=96)
    spoil(model, "model.norm.weight", (5,), float("inf"))
    gguf = save_tiny_gguf(model, tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(NonFiniteWeightError, match=r"model\.gguf: model\.norm\.weight\[5\] is inf"):
        export_model(ExportRequest(str(gguf), tmp_path / "out", parity=False), Reporter())


def test_adapter_is_refused_when_an_injected_weight_is_not_finite(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", layers=2)
    with open_checkpoint(model) as checkpoint:
        adapter = expansion_adapter(checkpoint.tensors, placements("tli", 2, every=2))
        save_adapter(adapter, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 1] = float("nan")
    save_file(tensors, tmp_path / "adapter" / "adapter.safetensors")
    for source in (model, save_foreign_graph(tmp_path / "foreign", "fp32", layers=2)):
        with pytest.raises(
            NonFiniteWeightError, match=r"adapter: model\.layers\.2\.mlp\.up_proj\.weight\[0, 1\] is nan"
        ):
            export_model(
                ExportRequest(str(source), tmp_path / "out", adapter=tmp_path / "adapter", parity=False), Reporter()
            )


def _nan_in_weight(model: ir.Model) -> None:
    _replace(model, UP, lambda values: values.__setitem__((4, 3), np.nan))


def _infinity_in_norm(model: ir.Model) -> None:
    _replace(model, "model.layers.0.input_layernorm.weight", lambda values: values.__setitem__(2, np.inf))


def _replace(model: ir.Model, name: str, change: Callable[[np.ndarray], None]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    values = np.array(value.const_value.numpy())
    change(values)
    value.const_value = ir.tensor(values, name=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan_in_weight, r"spoiled\.data, tensor at byte \d+: .*up_proj\.weight\[4, 3\] is nan"),
        (_infinity_in_norm, r"input_layernorm\.weight\[2\] is inf"),
    ],
)
def test_graph_is_refused_when_a_weight_of_its_own_is_not_finite(
    tmp_path: Path, change: Callable[[ir.Model], None], words: str
) -> None:
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    model = ir.load(graph)
    change(model)
    ir.save(model, graph.with_name("spoiled.onnx"), external_data="spoiled.data", size_threshold_bytes=0)
    request = ExportRequest(str(graph.with_name("spoiled.onnx")), tmp_path / "out", adapter=adapter, parity=False)
    with pytest.raises(NonFiniteWeightError, match=words):
        export_model(request, Reporter())
    assert not (tmp_path / "out").exists()
    assert export_model(dataclasses.replace(request, allow_nonfinite=True), Reporter()).bytes


def test_graph_is_taken_when_only_its_masks_are_infinite(tmp_path: Path) -> None:
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    model = ir.load(graph)
    _replace(model, "masked", lambda values: values.fill(-np.inf))
    for name, mask in (("mask", np.triu(np.full((32, 32), -np.inf, np.float32), 1)), ("bound", np.float32(np.inf))):
        # Read by a node whose output nobody needs: it must stay, since its values are not this program's to judge.
        value = ir.val(name, const_value=ir.tensor(np.asarray(mask), name=name))
        model.graph.register_initializer(value)
        model.graph.append(ir.node("Identity", [value], name=f"{name}.copy"))
    ir.save(model, graph, external_data="weights2")
    request = ExportRequest(str(graph), tmp_path / "out", adapter=adapter, parity=False)
    assert export_model(request, Reporter()).bytes


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_cast_is_refused_when_a_weight_is_too_large_for_fp16(tmp_path: Path, stored: str) -> None:
    model = spoil(save_tiny_llama(tmp_path / "model", dtype=stored), UP, (2, 1), -131072.0)
    words = rf"{UP}: its largest value is 131072, float16 ends at 65504[\s\S]*hint: use --dtype bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WeightOverflowError, match=words):
            export_model(ExportRequest(str(model), tmp_path / "out", dtype="fp16", parity=False), Reporter())
        assert not (tmp_path / "out").exists()
        export_model(ExportRequest(str(model), tmp_path / "bf16", dtype="bf16", parity=False), Reporter())


def test_cast_is_refused_before_parity_when_a_weight_is_too_large_for_an_engine_s_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spoil(save_tiny_llama(tmp_path / "model"), UP, (2, 1), 70_000.0)
    trt = TensorRtRequest("rtx", ("sm89",), max_batch=1, max_sequence=8, max_cache=16)
    request = ExportRequest(str(model), tmp_path / "out", dtype="fp16", trt=trt)
    with pytest.raises(WeightOverflowError, match=f"{UP}: its largest value is 70000"):
        export_model(request, Reporter(verbose=True))
    stages = capsys.readouterr().err
    assert "graph" in stages
    assert "parity" not in stages
    assert not (tmp_path / "out").exists()


def test_cast_is_made_when_a_weight_is_the_largest_of_fp16(tmp_path: Path) -> None:
    model = spoil(save_tiny_llama(tmp_path / "model"), UP, (2, 1), 65_504.0)
    result = export_model(ExportRequest(str(model), tmp_path / "out", dtype="fp16", parity=False), Reporter())
    assert all_finite(ir.load(result.folder / "model.onnx").graph.initializers[UP].const_value.numpy())


def test_checkpoint_is_not_written_when_a_computed_weight_is_not_finite(tmp_path: Path) -> None:
    tensors = {"router": ArrayTensor(np.array([[1.0, np.nan]], np.float32))}
    with pytest.raises(NonFiniteWeightError, match=r"router\[0, 1\] is nan"):
        save_safetensors(tensors, tmp_path / "model.safetensors")


def _adapter_on(model: Path, folder: Path, sha256: str | None = None, *, zero: bool = False) -> Path:
    with open_checkpoint(model) as checkpoint:
        own = checkpoint.sha256()
    router = np.zeros((1, 32), np.float32) if zero else np.full((1, 32), 0.1, np.float32)
    tensors = {"model.routers.1.weight": ArrayTensor(router)}
    save_adapter(DloAdapter("mlp", (False, True, False), base_sha256=sha256 or own, tensors=tensors), folder)
    return folder


def test_adapter_is_refused_when_it_was_made_from_another_base(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, tokenizer=True)
    other = save_tiny_llama(tmp_path / "other", vocab=BYTE_VOCABULARY, tokenizer=True, seed=1)
    adapter = _adapter_on(model, tmp_path / "adapter")
    small = ["--tokens", 512, "--evaluation-tokens", 512]
    words = "was made from weights with sha256"
    for command in (["export", "--no-parity"], ["calibrate", *small]):
        check_refused(
            dlo(*command, other, "--adapter", adapter, "-o", tmp_path / "out"), tmp_path, words, "--force-base"
        )
    result = export_model(ExportRequest(str(model), tmp_path / "right", adapter=adapter, parity=False), Reporter())
    assert (result.description.source.adapter, result.description.source.adapter_base) == ("adapter", "same")
    assert dlo("parity", tmp_path / "right", other, "--adapter", adapter).returncode == BAD_INPUT
    forced = ExportRequest(str(other), tmp_path / "forced", adapter=adapter, parity=False, force_base=True)
    assert export_model(forced, Reporter()).description.source.adapter_base == "forced"


def test_graph_takes_an_adapter_of_its_checkpoint_when_hashes_cannot_be_compared(tmp_path: Path) -> None:
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    source = open_source(graph, _adapter_on(tmp_path / "foreign" / "checkpoint", tmp_path / "adapter"))
    assert source.adapter_base == "not comparable"


ZEROS = "the routers of layers 1 are all zeros: every score is exactly 0.5"


class _Told(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize("parity", [True, False])
@pytest.mark.parametrize("way", ["checkpoint", "adapter", "graph"])
def test_zero_routers_are_told_of_once_on_every_way(tmp_path: Path, way: str, parity: bool) -> None:
    routed = [False, True, False] if way == "checkpoint" else None
    model, adapter = save_tiny_llama(tmp_path / "model", routed=routed), None
    if way == "checkpoint":
        tensors = load_file(model / "model.safetensors")
        tensors["model.routers.1.weight"] = torch.zeros(1, 32)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    else:
        adapter = _adapter_on(model, tmp_path / "adapter", zero=True)
    if way == "graph":
        model = save_foreign_graph(tmp_path / "foreign", "fp32")
    told = _Told()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_model(ExportRequest(str(model), tmp_path / "out", adapter=adapter, parity=parity), told)
    assert [warning for warning in told.warnings if warning.startswith(ZEROS)] == told.warnings != []
    assert inspect_model(tmp_path / "out").untrained_routers == [1]
    if parity and way == "adapter":
        assert "the routers of layers 1 are all zeros" in " ".join(dlo("inspect", tmp_path / "out").stdout.split())
        assert ZEROS in dlo("parity", tmp_path / "out", model, *(["--adapter", adapter] if adapter else [])).stderr


@pytest.mark.parametrize(("init", "layers"), [("zero_out", "0, 2, 4"), ("copy", "0, 1, 2, 3, 4, 5")])
def test_expand_tells_of_the_zero_routers_that_it_adds(tmp_path: Path, init: str, layers: str) -> None:
    """Those of new layers too, where these add something."""
    model = save_tiny_llama(tmp_path / "model")
    result = dlo("expand", model, "-o", tmp_path / "out", "--every", 1, "--init", init, "--routers")
    assert result.returncode == DONE, result.stderr
    assert f"warning: the routers of layers {layers} are all zeros" in result.stderr
    assert "every token skips those MLPs" in result.stderr


def test_expand_makes_routers_of_whole_layers_when_asked(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    result = dlo("expand", model, "-o", tmp_path / "deep", "--every", 1, "--routers", "--routing", "layer")
    assert result.returncode == DONE, result.stderr
    assert "every token skips those layers" in result.stderr
    assert json.loads((tmp_path / "deep" / "config.json").read_text())["model_type"] == "llama_dlo"
    check_refused(
        dlo("expand", tmp_path / "deep", "-o", tmp_path / "out", "--every", 1, "--routers", "--routing", "mlp"),
        tmp_path,
        "routing mlp was asked for, the model's routers are for routing layer",
    )
    alone = dlo("expand", model, "-o", tmp_path / "out", "--every", 1, "--routing", "layer")
    check_refused(alone, tmp_path, "give --routers too")


def test_zero_router_is_not_told_of_when_its_mlp_adds_nothing(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", layers=2)
    with open_checkpoint(model) as checkpoint:
        adapter = expansion_adapter(checkpoint.tensors, placements("tli", 2, every=2))
        assert [InjectedLayer(2, 1, "zero_out")] == list(adapter.injected_layers)
        zero = {"model.routers.2.weight": ArrayTensor(np.zeros((1, 32), np.float32))}
        adapter = dataclasses.replace(adapter, is_dlo=(False, False, True), tensors=dict(adapter.tensors) | zero)
        save_adapter(adapter, tmp_path / "adapter")
    assert open_source(model, tmp_path / "adapter").warnings == ()


def test_zero_router_of_a_whole_layer_is_told_of_when_its_attention_adds_something(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, False], model_type="llama_dlo")
    tensors = load_file(model / "model.safetensors")
    for name in ("model.routers.0.weight", "model.layers.0.mlp.down_proj.weight"):
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (warning,) = open_source(model, None).warnings
    assert "the routers of layers 0 are all zeros" in warning
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(32, 32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert open_source(model, None).warnings == ()


def test_errors_of_this_kind_are_bad_input() -> None:
    for kind in (NonFiniteWeightError, WeightOverflowError, AdapterError):
        assert issubclass(kind, InputError)
        assert kind.exit_code == BAD_INPUT
