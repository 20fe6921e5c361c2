"""What --provider and --device make of the commands where no GPU is."""

import contextlib
import json
from pathlib import Path
from typing import get_args

import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import RoutingKind, routed_type
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.lowering_choice import LoweredModel, choose_onnxruntime_lowering
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.runtimes.artefact.description import load_description
from tests.exporter.forked_commands import run
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

no_cuda = pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="of machines without it")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(
        tmp_path_factory.mktemp("model") / "routed",
        layers=2,
        vocab=BYTE_VOCABULARY,
        tokenizer=True,
        routed=(True, True),
    )


@pytest.fixture(scope="module")
def artefact(model: Path) -> Path:
    """For CUDA, of a type that the CPU's provider runs too."""
    folder = model.parent / "artefact"
    export_model(ExportRequest(str(model), folder, provider="cuda", dtype="fp32", parity=False), Reporter())
    return folder


@no_cuda
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bf16"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_export_for_cuda_is_of_16_bits_and_says_why_parity_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str, dtype: str
) -> None:
    source = save_tiny_llama(tmp_path / "model", layers=2, dtype=stored, routed=(True, False))
    result = export_model(ExportRequest(str(source), tmp_path / "out", provider="cuda"), Reporter())
    assert result.description == load_description(tmp_path / "out")
    assert (result.description.provider, result.description.dtype) == ("cuda", dtype)
    assert result.description.lowering == "compact"
    assert result.description.parity.verdict == "NOT RUN"
    assert "has no CUDAExecutionProvider" in (result.description.parity.reason or "")
    assert "parity is NOT RUN" in " ".join(capsys.readouterr().err.split())
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {"use_tf32": "0"}}]


@no_cuda
def test_commands_end_with_the_machines_code_when_a_provider_is_not_there(
    model: Path, artefact: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A decoder layer, and another one behind it. " * 40)
    commands = (
        ("run", artefact, "One"),
        ("bench", artefact, "--text", text, "--prompt-tokens", "8", "--decode-tokens", "2"),
        ("parity", artefact, model),
        ("evaluate", artefact, "--text", text),
    )
    for command in commands:
        ended = run(*command)
        assert ended.returncode == 4, ended.stderr
        assert "has no CUDAExecutionProvider" in ended.stderr
        assert "pip install onnxruntime-gpu" in " ".join(ended.stderr.split())
    # What is said on the command line counts, whatever the artefact was made for.
    for command in (commands[0], commands[2]):
        ended = run(*command, "--provider", "cpu")
        assert ended.returncode == 0, ended.stderr


def test_device_is_refused_before_the_work_when_it_is_not_there(model: Path, artefact: Path, tmp_path: Path) -> None:
    for command in (
        ("calibrate", model, "-o", tmp_path / "out", "--device", "cuda:99"),
        ("parity", artefact, model, "--provider", "cpu", "--device", "cuda:99"),
        ("evaluate", model, "--text", model / "config.json", "--device", "cuda:99"),
    ):
        ended = run(*command)
        assert (ended.returncode, "--device cuda:99: PyTorch finds" in ended.stderr) == (4, True), ended.stderr
    assert not (tmp_path / "out").exists()
    ended = run("calibrate", model, "-o", tmp_path / "out", "--device", "gpu")
    assert (ended.returncode, "--device gpu: is no device" in ended.stderr) == (2, True), ended.stderr


def test_provider_is_refused_when_something_else_runs_the_model(model: Path, artefact: Path, tmp_path: Path) -> None:
    for command in (
        ("evaluate", model, "--text", model / "config.json", "--provider", "cpu"),
        ("run", artefact, "One", "--trt", "--provider", "cpu"),
    ):
        ended = run(*command)
        assert (ended.returncode, "--provider cpu" in ended.stderr) == (2, True), ended.stderr
    with pytest.raises(InputError, match=r"--provider cuda and --trt.*\s+hint: export twice"):
        ExportRequest(str(model), tmp_path / "out", provider="cuda", trt=TensorRtRequest())


@pytest.mark.parametrize(
    ("provider", "library", "expected"),
    [("cpu", True, "compact"), ("cuda", False, "compact"), ("cuda", True, "plugin")],
)
def test_auto_takes_the_plugin_where_cuda_has_its_library(provider, library, expected) -> None:
    mlps, layers = (LoweredModel(Path("model"), kind, None, check=lambda record: None) for kind in ("mlp", "layer"))
    chosen, reason = choose_onnxruntime_lowering("auto", "fp32", mlps, provider=provider, library_at_hand=library)
    assert chosen == expected
    assert reason
    chosen, _ = choose_onnxruntime_lowering("auto", "fp32", layers, provider=provider, library_at_hand=library)
    assert chosen == "compact"


@pytest.mark.parametrize("kind", get_args(RoutingKind))
@pytest.mark.parametrize("lowering", ["masked", "compact", "if"])
def test_graph_for_cuda_has_no_operator_its_provider_lacks(kind: RoutingKind, lowering: str, tmp_path: Path) -> None:
    routing_kv = "active" if kind == "attention-active" else None
    checkpoint = save_tiny_llama(
        tmp_path / "model", layers=2, routed=(True, True), model_type=routed_type(kind).name, routing_kv=routing_kv
    )
    with contextlib.closing(open_source(str(checkpoint), None)) as source:
        model = build_model(source, lowering, ir.DataType.BFLOAT16, "onnxruntime-cuda")
    nodes = list(model.graph.all_nodes())
    # As the kernels of onnxruntime-gpu 1.31.1 say: it reduces numbers alone, and adds no bfloat16 in ScatterND.
    reduced = [node for node in nodes if node.op_type == "ReduceMax"]
    assert bool(reduced) == (lowering == "if")
    assert all(node.inputs[0].dtype == ir.DataType.FLOAT for node in reduced)
    assert not [node for node in nodes if node.op_type == "ScatterND" and "reduction" in node.attributes]
    # The host waits for conditions: compact, which knows the number of rows already, asks for none.
    assert any(node.op_type == "If" for node in nodes) == (lowering == "if")
