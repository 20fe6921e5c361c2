"""dlo::GatherActive on ONNX Runtime's CPU provider against NumPy, and in graphs whose MLPs are quantised."""

import itertools
import json
import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest

from dlo_export.checkpoints.interface import force_active_name
from dlo_export.exporter.app import app
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.pipeline import exposed
from dlo_export.exporter.progress import Reporter
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE, VERSION
from dlo_export.plugins.gather_active.reference import gather_active
from dlo_export.plugins.ort_registration import register_library
from dlo_export.runtimes.generation.generate import generate
from tests.foreign_graphs import save_routed_adapter
from tests.genai_graphs import save_genai_graph
from tests.plugins.ort_library import built_library


@pytest.fixture(scope="module")
def library():
    return built_library()


def session_options(library):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    register_library(options, library)
    return options


def session(library, weight=None, threshold=None):
    """The operator alone; a router that is given is constant."""
    types = {"float32": "float", "int64": "int64"}

    def declared(operands):
        return ", ".join(f"{types[each.dtype]}[{', '.join(each.dims)}] {each.name}" for each in operands)

    names = ", ".join(operand.name for operand in GATHER_ACTIVE.inputs)
    outputs = ", ".join(operand.name for operand in GATHER_ACTIVE.outputs)
    model = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23, "{DOMAIN}" : {VERSION}]> '
        f"graph ({declared(GATHER_ACTIVE.inputs)}) => ({declared(GATHER_ACTIVE.outputs)}) "
        f"{{{outputs} = {DOMAIN}.{GATHER_ACTIVE.name} ({names})}}"
    )
    for name, array in (("router_weight", weight), ("threshold", threshold)):
        if array is not None:
            (value,) = (value for value in model.graph.inputs if value.name == name)
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=name)
            value.shape = ir.Shape(array.shape)
            model.graph.register_initializer(value)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), session_options(library))


def operands(rng, tokens, hidden, width, threshold):
    return {
        "hidden_states": rng.standard_normal((*tokens, hidden)).astype(np.float32),
        "router_weight": (3 * rng.standard_normal((hidden, 1)) / hidden**0.5).astype(np.float32),
        "threshold": np.array(threshold, np.float32),
        "values": rng.standard_normal((*tokens, width)).astype(np.float32),
    }


@pytest.mark.parametrize("constant", [False, True], ids=["router given", "router constant"])
def test_operator_gathers_what_numpy_does_when_all_some_or_no_tokens_are_active(library, constant):
    rng = np.random.default_rng(0)
    counts = set()
    for (hidden, width), threshold in itertools.product(((8, 8), (72, 5), (1032, 24)), (-1, 0.5, 2)):
        # decode, a batch of it, a batch of prompts, a prompt, nothing
        steps = [
            operands(rng, tokens, hidden, width, threshold)
            for tokens in ((1, 1), (3, 1), (2, 5), (1, 37), (1, 0), (0, 4))
        ]
        router = {name: steps[0][name] for name in ("router_weight", "threshold")}
        runs = session(library, *(router.values() if constant else ()))
        for step in ({**each, **router} for each in steps):
            expected = gather_active(**step)
            fed = {name: array for name, array in step.items() if not (constant and name in router)}
            scores, index, rows = runs.run(None, fed)
            np.testing.assert_allclose(scores, expected[0], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(index, expected[1])
            assert rows.tobytes() == expected[2].tobytes()
            assert (index.shape, rows.shape) == ((len(rows), 2), (len(rows), width))
            counts.add(len(rows) / max(1, scores.size))
    assert {0, 1} < counts


def test_a_token_is_skipped_when_its_score_is_nan_or_the_threshold_itself(library):
    given = operands(np.random.default_rng(0), (1, 3), 8, 4, 0.5)
    given["hidden_states"][0, 0], given["hidden_states"][0, 1] = np.nan, 0  # sigmoid(0) is 0.5
    given["hidden_states"][0, 2] = given["router_weight"][:, 0]
    scores, index, _ = session(library).run(None, given)
    assert index.tolist() == [[0, 2]]
    assert scores[0, 1] == 0.5
    assert np.isnan(scores[0, 0])


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("router_weight", (16, 1), "input 'hidden_states' has hidden 8; expected 16"),
        ("router_weight", (8, 2), "input 'router_weight' has one 2; expected 1"),
        ("values", (1, 2, 4), "input 'values' has sequence 2; expected 3"),
        ("values", (2, 3, 4), "input 'values' has batch 2; expected 1"),
    ],
)
def test_operator_refuses_by_name_when_sizes_do_not_fit(library, name, shape, reason):
    given = operands(np.random.default_rng(0), (1, 3), 8, 4, 0.5) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(Exception, match=f"dlo::GatherActive {reason}"):
        session(library).run(None, given)


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ((np.zeros((8, 2), np.float32), np.float32(0.5)), "'router_weight' has one 2; expected 1"),
        ((np.zeros((8, 1), np.float32), np.zeros(0, np.float32)), "'threshold' has rank 1; expected 0"),
    ],
)
def test_session_is_refused_when_a_constant_router_does_not_fit(library, router, reason):
    with pytest.raises(Exception, match=reason):
        session(library, router[0], np.asarray(router[1]))


@pytest.fixture(scope="module")
def routed(library, tmp_path_factory):
    """A graph of onnxruntime-genai's builder, 4 bits, and by lowering what an export made of it."""
    folder = tmp_path_factory.mktemp("quantised")
    graph = save_genai_graph(folder, "int4")
    adapter = save_routed_adapter(graph, folder / "adapter")

    def exported(lowering):
        request = ExportRequest(
            str(graph), folder / lowering, adapter=adapter, lowering=lowering, ort_plugin_library=library
        )
        return export_model(request, Reporter())

    return {lowering: exported(lowering) for lowering in ("plugin", "compact")}


def test_quantised_mlps_run_on_rows_of_the_operator_when_lowered_to_plugins(library, routed):
    result = routed["plugin"]
    assert result.description.parity.verdict == "PASS", result.parity_summary
    cases = json.loads((result.folder / "parity.json").read_text())["cases"]
    assert max(case["logits"]["largest_absolute"] for case in cases) <= 1e-5  # AVX-512: not a bit differs
    assert result.description.plugin_operators == ("dlo::GatherActive",)
    assert result.description.capture_problem == "the number of active tokens is read back by the host"
    assert open_description(result.folder) == result.description
    graph = ir.load(result.folder / "model.onnx").graph
    operators = [node.op_type for node in graph]
    assert operators.count("GatherActive") == len(result.description.routed_layers) == 6
    assert not {"NonZero", "GatherND", "Greater", "Squeeze"} & set(operators)
    tokens = np.arange(8).reshape(1, 8)
    scores = {}
    for lowering, each in routed.items():
        with open_artefact(each.folder, plugin_library=library) as runner:
            runner.reset(1)
            scores[lowering] = runner.step(tokens, np.ones_like(tokens), tokens)
    np.testing.assert_array_equal(scores["plugin"].logits, scores["compact"].logits)
    for layer, expected in scores["compact"].router_scores.items():
        np.testing.assert_allclose(scores["plugin"].router_scores[layer], expected, rtol=0, atol=1e-6)


def test_operator_gathers_what_it_is_told_to_when_decisions_are_forced(library, routed, tmp_path):
    folder = shutil.copytree(routed["plugin"].folder, tmp_path / "artefact")
    ir.save(exposed(ir.load(folder / "model.onnx"), force=True), folder / "exposed.onnx")
    runs = ort.InferenceSession(folder / "exposed.onnx", session_options(library))
    shapes = {value.name: [dim if isinstance(dim, int) else 1 for dim in value.shape] for value in runs.get_inputs()}
    caches = {name: shape for name, shape in shapes.items() if "past" in name}
    past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in caches.items()}
    ids, found = np.arange(5)[None], []
    for active in (True, False):
        forced = {force_active_name(layer): np.full((1, 5), active) for layer in range(6)}
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past, **forced}
        found.append(dict(zip([each.name for each in runs.get_outputs()], runs.run(None, feeds), strict=True)))
    assert np.abs(found[0]["logits"] - found[1]["logits"]).max() > 0.1
    # What is forced changes who runs the MLP, not what the first layer's router says.
    np.testing.assert_array_equal(found[0]["router_scores.0"], found[1]["router_scores.0"])


def test_genai_generates_what_our_runner_does_when_the_operator_finds_the_rows(library, routed, tmp_path):
    folder, prompt = tmp_path / "artefact", list(range(5, 14))
    shutil.copytree(routed["plugin"].folder, folder)
    shutil.copy(library, folder)
    with open_artefact(folder, plugin_library=library) as runner:
        (wanted,) = generate(runner, [prompt], max_new_tokens=8).sequences
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 8, min_length=len(prompt) + 8, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist()[len(prompt) :] == wanted


def test_inspection_names_the_operator_when_an_artefact_needs_the_library(routed, capsys):
    app(["inspect", str(routed["plugin"].folder)], standalone_mode=False)
    assert "GatherActive" in capsys.readouterr().out
