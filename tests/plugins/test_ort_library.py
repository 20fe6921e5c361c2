"""libdlo_ort.so on ONNX Runtime's CPU provider against NumPy; skipped where ONNX Runtime's headers are not."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest

from dlo_export.checkpoints.dtypes import BY_NAME
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.graph_passes.spec.ops import DOMAIN, ORT_OPS, PLUGIN_OPS, VERSION
from dlo_export.plugins.contract import SIZES_HINT, T_DTYPES
from dlo_export.plugins.errors import PluginLibraryError
from dlo_export.plugins.ort_registration import register_library
from dlo_export.plugins.router_scores.reference import router_scores
from dlo_export.plugins.skip_down.reference import skip_down
from dlo_export.plugins.skip_gate_up.reference import skip_gate_up
from tests.plugins.ort_library import built_library
from tests.tiny_models import save_tiny_llama

TOLERANCE = 1e-5
"""Of a row's largest output."""


@pytest.fixture(scope="module")
def library():
    return built_library()


@pytest.fixture(scope="module")
def sessions(library):
    return {name: session(library, name) for name in ORT_OPS}


def session(library, name, dtype="float32", threads=2, *, ranks=True):
    """Of a model of one node; without ranks, whose inputs and output may have any shape."""
    op = ORT_OPS[name]

    def declared(operands):
        types = [BY_NAME[dtype if operand.dtype == "T" else operand.dtype].onnx for operand in operands]
        return ", ".join(
            f"{kind}[{', '.join(operand.dims) if ranks else ''}] {operand.name}"
            for kind, operand in zip(types, operands, strict=True)
        )

    attributes = ", ".join(f'{key}: string = "{value}"' for key, value in op.attributes.items())
    names = ", ".join(operand.name for operand in op.inputs)
    model = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23, "{DOMAIN}" : {VERSION}]>\n'
        f"graph ({declared(op.inputs)}) => ({declared(op.outputs)}) "
        f"{{{op.outputs[0].name} = {DOMAIN}.{name} <{attributes}> ({names})}}"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    register_library(options, library)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def mlp(rng, hidden, intermediate):
    """Gate, up and down weights whose products are of size 1."""
    gate, up = (normal(rng, hidden, intermediate) / np.float32(hidden**0.5) for _ in range(2))
    return gate, up, normal(rng, intermediate, hidden) / np.float32(intermediate**0.5)


def error_of(got, expected):
    if not got.size:
        return 0.0
    return float((np.abs(got - expected).max(-1) / np.abs(expected).max(-1)).max())


MASKS = {
    "none": lambda rng, shape: np.zeros(shape, bool),
    "all": lambda rng, shape: np.ones(shape, bool),
    "mixed": lambda rng, shape: rng.random(shape) < 0.5,
    "few": lambda rng, shape: rng.random(shape) < 0.1,
}
# decode, a batch of it, more rows than are read where they lie, a prompt, two blocks of a prompt, nothing
TOKENS = [(1, 1), (3, 1), (2, 5), (1, 37), (2, 120), (1, 0), (0, 4)]
# widths with and without columns behind the last whole vector, strip and depth block
WIDTHS = [(8, 8), (72, 200), (264, 520)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_operators_compute_what_numpy_does_when_tokens_are_active(sessions, tokens, mask):
    for hidden, intermediate in WIDTHS:
        rng = np.random.default_rng(hidden)
        gate, up, down = mlp(rng, hidden, intermediate)
        active = MASKS[mask](rng, tokens)
        scale = np.where(active, rng.uniform(0.2, 2, tokens), rng.choice([0.0, -0.0], tokens)).astype(np.float32)
        x, residual = normal(rng, *tokens, hidden), normal(rng, *tokens, hidden)
        feeds = {"hidden_states": x, "scale": scale, "gate_weight": gate, "up_weight": up}
        expected = skip_gate_up(x, scale, gate, up)
        (gated,) = sessions["SkipGateUp"].run(None, feeds)
        assert gated.shape == expected.shape
        assert error_of(gated[active], expected[active]) <= TOLERANCE
        gated = np.where(active[..., None], expected, np.float32(np.nan))  # nobody may read a skipped token's row
        feeds = {"gated": gated, "scale": scale, "down_weight": down, "residual": residual}
        (output,) = sessions["SkipDown"].run(None, feeds)
        expected = skip_down(gated, scale, down, residual)
        assert error_of(output[active], expected[active]) <= TOLERANCE
        assert output[~active].tobytes() == residual[~active].tobytes()


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_router_gives_the_scores_numpy_does(sessions, tokens):
    for hidden in (8, 72, 1032):
        rng = np.random.default_rng(hidden)
        x, weight = normal(rng, *tokens, hidden), 3 * normal(rng, hidden, 1) / np.float32(hidden**0.5)
        (scores,) = sessions["RouterScores"].run(None, {"hidden_states": x, "router_weight": weight})
        assert scores.shape == tokens
        np.testing.assert_allclose(scores, router_scores(x, weight), rtol=0, atol=1e-6)


def test_a_token_is_active_when_its_scale_is_nan(sessions):
    rng = np.random.default_rng(0)
    gate, up, down = mlp(rng, 16, 24)
    x, scale = normal(rng, 1, 3, 16), np.array([[np.nan, 0, 1]], np.float32)
    (gated,) = sessions["SkipGateUp"].run(
        None, {"hidden_states": x, "scale": scale, "gate_weight": gate, "up_weight": up}
    )
    assert error_of(gated[0, [0, 2]], skip_gate_up(x, scale, gate, up)[0, [0, 2]]) <= TOLERANCE
    gated[0, 1] = np.nan
    (output,) = sessions["SkipDown"].run(None, {"gated": gated, "scale": scale, "down_weight": down, "residual": x})
    assert np.isnan(output[0, 0]).all()
    assert np.isfinite(output[0, 1:]).all()


def test_bits_of_a_skipped_token_pass_through_when_they_are_a_nan_with_a_payload(sessions):
    rng = np.random.default_rng(0)
    residual = rng.integers(0, 256, 2 * 64 * 4, np.uint8).view(np.float32).reshape(1, 2, 64)
    residual.view(np.uint32)[0, 0, :3] = 0x7FC0BEEF, 0xFF800001, 0x80000000
    feeds = {"gated": normal(rng, 1, 2, 8), "scale": np.zeros((1, 2), np.float32), "down_weight": normal(rng, 8, 64)}
    (output,) = sessions["SkipDown"].run(None, {**feeds, "residual": residual})
    assert output.tobytes() == residual.tobytes()


def test_silu_is_right_at_both_ends_when_gates_are_huge(sessions):
    gates = np.array([-1e30, -200, -87, -20, -1e-3, 0, 1e-3, 20, 87, 200, 1e30, 0, 0, 0, 0, 0], np.float32)
    x = np.zeros((1, 1, 16), np.float32)
    x[0, 0, 0] = 1
    gate, up = np.zeros((16, 16), np.float32), np.zeros((16, 16), np.float32)
    gate[0], up[0] = gates, 1
    feeds = {"hidden_states": x, "scale": np.ones((1, 1), np.float32), "gate_weight": gate, "up_weight": up}
    (gated,) = sessions["SkipGateUp"].run(None, feeds)
    np.testing.assert_allclose(gated, skip_gate_up(**feeds), rtol=2e-6, atol=1e-7)


def test_results_are_the_same_bits_when_threads_differ(library, sessions):
    rng = np.random.default_rng(0)
    gate, up, _ = mlp(rng, 72, 200)
    feeds = {"hidden_states": normal(rng, 2, 120, 72), "scale": np.ones((2, 120), np.float32)}
    feeds |= {"gate_weight": gate, "up_weight": up}
    single = session(library, "SkipGateUp", threads=1)
    assert single.run(None, feeds)[0].tobytes() == sessions["SkipGateUp"].run(None, feeds)[0].tobytes()


@pytest.mark.parametrize("name", ORT_OPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cpu_refuses_by_name_when_operands_have_16_bits(library, name, dtype):
    with pytest.raises(Exception, match=f"dlo::{name}: on a CPU it computes float32 alone, the model is {dtype}"):
        session(library, name, dtype)


def test_operator_refuses_with_all_sizes_when_they_do_not_fit(sessions):
    feeds = {
        "hidden_states": np.zeros((1, 1, 12), np.float32),
        "scale": np.zeros((1, 2), np.float32),
        "gate_weight": np.zeros((12, 16), np.float32),
        "up_weight": np.zeros((12, 24), np.float32),
    }
    with pytest.raises(Exception, match="input 'hidden_states' has hidden 12; expected a multiple of 8") as error:
        sessions["SkipGateUp"].run(None, feeds)
    assert "input 'scale' has sequence 2; expected 1" in str(error.value)
    assert "input 'up_weight' has intermediate 24; expected 16" in str(error.value)
    assert f"hint: {SIZES_HINT}" in str(error.value)


def test_operator_says_once_of_an_axis_that_it_does_not_fit(sessions):
    feeds = {
        "gated": np.zeros((1, 2, 16), np.float32),
        "scale": np.zeros((1, 2), np.float32),
        "down_weight": np.zeros((16, 8), np.float32),
        "residual": np.zeros((1, 3, 8), np.float32),
    }
    with pytest.raises(Exception, match="input 'residual' has sequence 3; expected 2") as error:
        sessions["SkipDown"].run(None, feeds)
    assert str(error.value).count("input 'residual'") == 1


def test_operator_reads_no_axis_of_an_operand_that_has_too_few(library):
    feeds = {
        "gated": np.zeros((1, 16), np.float32),
        "scale": np.zeros((1, 1), np.float32),
        "down_weight": np.zeros((16, 8), np.float32),
        "residual": np.zeros((1, 1, 8), np.float32),
    }
    with pytest.raises(Exception, match="input 'gated' has rank 2; expected 3") as error:
        session(library, "SkipDown", ranks=False).run(None, feeds)
    assert str(error.value).count("dlo::SkipDown input") == 1


def test_library_links_neither_onnxruntime_nor_cuda_when_built(library):
    assert shutil.which("readelf"), "binutils come with the compiler"
    result = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1].rstrip("]") for line in result.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if any(word in name for word in ("onnxruntime", "cuda"))]


@pytest.fixture(scope="module")
def answers(library):
    """What ort_library_probe.cpp prints."""
    build = ["cmake", "--build", str(library.parent), "--target", "ort_library_probe"]
    subprocess.run(build, check=True, capture_output=True)
    (runtime,) = Path(ort.__file__).parent.glob("capi/libonnxruntime.so*")
    program = [library.with_name("ort_library_probe"), library, runtime]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_library_names_both_versions_when_onnxruntime_is_older_than_its_interface(answers):
    assert answers[0] == "old: libdlo_ort.so: needs ONNX Runtime 1.17 or newer, this is 1.16.0"


@pytest.mark.parametrize("name", ORT_OPS)
def test_every_type_is_registered_for_both_providers_when_asked(answers, name):
    registered = [line for line in answers if f"ExecutionProvider {name}: " in line]
    assert sorted(line.split()[0] for line in registered) == [
        *["CPUExecutionProvider"] * len(T_DTYPES),
        *["CUDAExecutionProvider"] * len(T_DTYPES),
    ]
    assert [line for line in registered if line.endswith(": made")] == [f"CPUExecutionProvider {name}: made"]


@pytest.mark.parametrize("name", ORT_OPS)
def test_cuda_refuses_by_name_when_there_is_no_driver(answers, name):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("libdlo_ort.so: a CUDA driver is here")
    refused = [line for line in answers if line.startswith("CUDAExecutionProvider")]
    assert any(f" {name}: dlo::{name}: no CUDA driver: libcuda.so.1: " in line for line in refused)


def test_cuda_refuses_by_name_when_an_operator_is_the_cpus_alone(answers):
    (line,) = (line for line in answers if line.startswith("CUDAExecutionProvider GatherActive: "))
    assert "is for the CPU provider; on CUDA the host would wait for the number of active tokens" in line
    assert "CPUExecutionProvider GatherActive: made" in answers


@pytest.fixture(scope="module")
def exported(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    checkpoint = save_tiny_llama(folder / "model", routed=[True, False, True])
    request = ExportRequest(str(checkpoint), folder / "out", lowering="plugin", ort_plugin_library=library)
    return export_model(request, Reporter())


def test_parity_passes_when_the_library_runs_the_plugin_lowering(exported):
    assert exported.description.parity.verdict == "PASS"
    assert "plugin  mixed decisions" in exported.parity_summary
    assert exported.description.capture_problem is None
    assert open_description(exported.folder) == exported.description


def test_runner_gives_scores_when_it_has_the_library(library, exported):
    with open_artefact(exported.folder, plugin_library=library) as runner:
        runner.reset(1)
        tokens = np.arange(8).reshape(1, 8)
        result = runner.step(tokens, np.ones_like(tokens), tokens)
    assert np.isfinite(result.logits).all()
    assert sorted(result.router_scores) == [0, 2]


def test_runner_asks_for_the_library_when_an_artefact_needs_one(exported):
    with pytest.raises(PluginLibraryError, match=r"libdlo_ort\.so alone, and none is given") as error:
        open_artefact(exported.folder)
    assert error.value.exit_code == 4


def test_genai_generates_what_our_runner_does_when_the_library_lies_in_the_artefact(library, exported, tmp_path):
    folder = tmp_path / "artefact"
    shutil.copytree(exported.folder, folder)
    shutil.copy(library, folder)
    prompt = np.array([[5, 6, 7, 8]], np.int32)
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=16, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    logits = generator.get_logits()[0, -1]
    with open_artefact(exported.folder, plugin_library=library) as runner:
        runner.reset(1)
        result = runner.step(prompt.astype(np.int64), np.ones((1, 4), np.int64), np.arange(4).reshape(1, 4))
    np.testing.assert_allclose(logits, result.logits[0, -1], atol=1e-5)


def test_session_refuses_widths_when_it_is_made(library):
    """What is declared, as weights are, is known before the first step."""
    attributes = ", ".join(f'{key}: string = "{value}"' for key, value in PLUGIN_OPS["SkipDown"].attributes.items())
    model = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23, "{DOMAIN}" : {VERSION}]>\n'
        "graph (float[b,s,16] g, float[b,s] c, float[16,12] w, float[b,s,12] r) => (float[b,s,12] y) "
        f"{{y = {DOMAIN}.SkipDown <{attributes}> (g, c, w, r)}}"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    register_library(options, library)
    with pytest.raises(Exception, match="input 'down_weight' has hidden 12; expected a multiple of 8") as error:
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert f"hint: {SIZES_HINT}" in str(error.value)
