"""Graphs of onnxruntime-genai's builder: packed, fused, quantised; deepened and routed in their own form."""

import collections
import contextlib
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.app import app
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.export import ExportRequest, ParityFailedError, export_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.pipeline import exposed
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.foreign_graphs import save_routed_adapter
from tests.genai_graphs import FORMS, INT4_FLOAT16, LAST_LOGITS, build, save_genai_graph
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer, save_tiny_llama

# How far a weight may be from the checkpoint's, as a share of the largest of its tensor.
ROUNDING = {"fp32": 0, "fp16": 1e-3, "int4": 1 / 8, "int8": 1 / 128}
SEQUENCE = 7
FLOAT16_UNIT = float(np.finfo(np.float16).eps)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The graph of a form, made once."""
    return functools.cache(lambda form: save_genai_graph(tmp_path_factory.mktemp("genai"), form))


def logits(path, steps=(SEQUENCE,), *, packed=True):
    """Of a graph that counts positions itself, step by step behind its cache, float32 [1, tokens, vocab].

    Not packed: quantised weights are multiplied by as they are, by activations as they are.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    session = ort.InferenceSession(path, options)
    past = {value.name: value for value in session.get_inputs() if value.name.startswith("past")}
    outputs = [value.name for value in session.get_outputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {name: np.zeros((1, 2, 0, 16), types[value.type]) for name, value in past.items()}
    ids = np.random.default_rng(0).integers(0, 200, (1, sum(steps)))
    found, done = [], 0
    for step in steps:
        mask = np.ones((1, done + step), np.int64)
        feeds = {"input_ids": ids[:, done : done + step], "attention_mask": mask, **cache}
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        cache = {name: results[name.replace("past_key_values", "present")] for name in past}
        found.append(results["logits"].astype(np.float32))
        done += step
    return np.concatenate(found, 1)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_checkpoint(graph, form):
    path = graph(form)
    wanted = load_file(path.parents[1] / "checkpoint" / "model.safetensors")
    opened = open_foreign_graph(path)
    assert opened.num_layers == 3
    assert opened.tensors.keys() - wanted.keys() == ({"lm_head.weight"} if "tied" in form else set())
    assert not wanted.keys() - opened.tensors.keys()
    wanted.setdefault("lm_head.weight", wanted["model.embed_tokens.weight"])
    for name, tensor in opened.tensors.items():
        assert tensor.shape == wanted[name].shape
        allowed = ROUNDING[form.split(",")[0]] * np.abs(wanted[name]).max()
        assert np.abs(tensor.numpy().astype(np.float32) - wanted[name]).max() <= allowed, name


def exported(path, output, *, adapter=None, **options):
    """An export of a graph: routed by an adapter, or deepened by layers that add nothing."""
    if adapter is None:
        adapter = output.with_name(f"{output.name}-adapter")
        save_adapter(expansion_adapter(open_foreign_graph(path).tensors, placements("tli", 3, every=1)), adapter)
    return export_model(ExportRequest(str(path), output, adapter=adapter, **options), Reporter())


@pytest.mark.parametrize("form", FORMS)
def test_logits_stay_when_layers_that_add_nothing_are_injected(graph, form, tmp_path):
    path, steps = graph(form), (4, 1, 2)
    result = exported(path, tmp_path / "out")
    assert result.description.parity.verdict == "PASS", result.parity_summary
    assert "against the graph as it was" in result.parity_summary
    before, after = logits(path, steps), logits(tmp_path / "out" / "model.onnx", steps)
    # In float16 the fused norm reads a sum that is not rounded yet; what adds nothing to it rounds it, by half a unit
    # in its last place in every layer: two units of the largest logit are left for them.
    assert np.abs(after - before).max() <= (2**-9 * np.abs(before).max() if form == "fp16" else 0)
    # What stood in the graph stands there, byte for byte; what is new has the form of what stood there.
    old, new = ir.load(path).graph, ir.load(tmp_path / "out" / "model.onnx").graph
    contents = {value.const_value.tobytes() for value in new.initializers.values()}
    assert all(value.const_value.tobytes() in contents for value in old.initializers.values())
    forms = [{(value.dtype, tuple(value.shape)) for value in each.initializers.values()} for each in (old, new)]
    assert forms[0] == forms[1]
    # Twice as many layers, and the first one's norm is the only one without an addition, as before.
    counts = [collections.Counter(node.op_type for node in each if node.op_type != "Constant") for each in (old, new)]
    outside = {op: count % 3 for op, count in counts[0].items()}
    assert counts[1] == {op: 2 * (count - outside[op]) + outside[op] for op, count in counts[0].items()}


@pytest.mark.parametrize(
    "form", ["fp32", "fp32, apart", "fp16", "int4", "int4, gate and up packed", "int4, zero points"]
)
def test_lowerings_equal_the_masked_graph_when_routed(graph, form, tmp_path):
    adapter = save_routed_adapter(graph(form), tmp_path / "adapter")
    found = {}
    for lowering in ("masked", "compact", "if"):
        result = exported(graph(form), tmp_path / lowering, adapter=adapter, lowering=lowering)
        parity = result.description.parity
        assert parity.verdict == ("NOT RUN" if lowering == "masked" else "PASS"), parity.reason
        found[lowering] = logits(tmp_path / lowering / "model.onnx", (4, 1, 1))
        if form.startswith("int4") and lowering != "masked":
            # Products of 8-bit activations do not depend on how many rows there are, or (AVX2) by their last bits.
            cases = json.loads((tmp_path / lowering / "parity.json").read_text())["cases"]
            assert max(case["logits"]["largest_absolute"] for case in cases) <= 1e-5
    assert np.abs(found["masked"] - logits(graph(form), (4, 1, 1))).max() > 0.1
    # Masked and if have their norms fused as before, and are equal bit for bit. Compact has not, and a norm that rounds
    # in another way may move what int4 products round to 8 bits by a step, 1/127 of the largest of its block. Where
    # these products read their activations as they are, nothing else is left.
    np.testing.assert_array_equal(found["if"], found["masked"])
    if form.startswith("int4"):
        assert np.abs(found["compact"] - found["masked"]).max() <= 2 / 127 * np.abs(found["masked"]).max()
        for lowering in ("masked", "compact"):
            found[lowering] = logits(with_activations_as_they_are(tmp_path / lowering / "model.onnx"), (4, 1, 1))
    allowed = 2 * FLOAT16_UNIT * np.abs(found["masked"]).max() if form == "fp16" else 1e-5
    assert np.abs(found["compact"] - found["masked"]).max() <= allowed


def with_activations_as_they_are(path):
    """The same graph, whose MatMulNBits nodes do not round to 8 bits what they multiply, beside it."""
    model = ir.load(path)
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}  # activations in int8
    for node in products:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)  # in float32
    ir.save(model, path.with_name("float32-activations.onnx"))
    return path.with_name("float32-activations.onnx")


@pytest.mark.parametrize("link", [False, True])
def test_parity_refuses_another_source_when_the_artefact_is_compared_with_itself_alone(graph, link, tmp_path):
    """Graph and masked form run on the artefact's weights: only the source's own bytes say whether they are its."""
    path = Path(shutil.copytree(graph("int4").parent, tmp_path / "graph")) / "model.onnx"
    adapters = [save_routed_adapter(path, tmp_path / f"adapter-{seed}", seed=seed) for seed in (0, 1)]
    result = exported(path, tmp_path / "out", adapter=adapters[0], link_weights=link)
    assert result.description.parity.verdict == "PASS"

    def compared(adapter):
        with contextlib.closing(open_source(str(path), adapter)) as source:
            return check_parity(source, result.folder, result.description)

    assert compared(adapters[1]).verdict == "FAIL"  # routers so small lie in the graph itself
    data = bytearray((path.parent / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (path.parent / "model.onnx.data").unlink()  # or a link would change with it
    (path.parent / "model.onnx.data").write_bytes(data)
    with pytest.raises(InputError, match=r"its weights are not those of an export of this source: \w+"):
        compared(adapters[0])


def test_if_is_refused_with_a_doubt_about_kernels_when_products_of_8_bits_are_float16(tmp_path):
    path = save_genai_graph(tmp_path / "genai", INT4_FLOAT16, layers=2)
    adapter = save_routed_adapter(path, tmp_path / "adapter")
    exported(path, tmp_path / "masked", adapter=adapter, lowering="masked")
    with pytest.raises(ParityFailedError, match=r"parity FAIL[\s\S]*hint: .*accuracy_level 0") as caught:
        exported(path, tmp_path / "if", adapter=adapter, lowering="if")
    found, masked = caught.value.kept / "model.onnx", tmp_path / "masked" / "model.onnx"
    # Packed, the branch's product is garbage. The graph is right: on the kernels that do not pack, not a bit differs.
    np.testing.assert_array_equal(logits(found, (4, 1, 1), packed=False), logits(masked, (4, 1, 1), packed=False))
    # Nothing of ours is needed for it: one product, its scales constants, or computed from the same numbers (in memory
    # that nobody has written, so the error may be any).
    assert error_of_an_8_bit_product("scales") < 1e-2
    assert not error_of_an_8_bit_product("cast_scales") < 0.1


def error_of_an_8_bit_product(scales):
    """Of MatMulNBits in ONNX Runtime, as a share of the largest product."""
    rng = np.random.default_rng(0)
    codes, numbers = rng.integers(0, 256, (96, 2, 16), np.uint8), rng.uniform(0.01, 0.03, (96, 2)).astype(np.float16)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        product (float[m, 64] x, float16[96, 2] given) => (float[m, 96] y) {
            cast_scales = Cast <to=1> (given)
            y = com.microsoft.MatMulNBits <K=64, N=96, bits=4, block_size=32, accuracy_level=4> (x, codes, SCALES)
        }""".replace("SCALES", scales)
    )
    constants = {"codes": codes, "scales": numbers.astype(np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    x = rng.standard_normal((5, 64)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x, "given": numbers})
    weight = (np.stack([codes & 15, codes >> 4], axis=-1).reshape(96, 2, 32) - 8.0) * numbers[..., None]
    wanted = x @ weight.reshape(96, 64).T
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_lowering_is_compared_with_the_masked_graph_when_both_compute_the_last_logits_alone(tmp_path):
    path = save_genai_graph(tmp_path / "genai", LAST_LOGITS, layers=2)
    assert logits(path).shape[1] == 1
    adapter = save_routed_adapter(path, tmp_path / "adapter")
    parity = exported(path, tmp_path / "out", adapter=adapter, lowering="compact").description.parity
    assert parity.verdict == "PASS", parity.reason
    assert logits(tmp_path / "out" / "model.onnx").shape[1] == 1


def test_branches_skip_weights_that_nodes_dequantise_and_compute_what_the_masked_graph_does(graph, tmp_path):
    path = graph("int4, DequantizeLinear")
    adapter = save_routed_adapter(path, tmp_path / "adapter")
    for lowering in ("masked", "if"):
        exported(path, tmp_path / lowering, adapter=adapter, lowering=lowering)
    found, masked = (tmp_path / lowering / "model.onnx" for lowering in ("if", "masked"))
    # The one multiplies by codes in another order, the other by what ONNX Runtime makes of the graph's own nodes.
    np.testing.assert_array_equal(logits(found, (4, 1, 1)), logits(masked, (4, 1, 1)))
    parity = json.loads((tmp_path / "if" / "parity.json").read_text())
    assert (parity["verdict"], {case["logits"]["largest_absolute"] for case in parity["cases"]}) == ("PASS", {0.0})
    branches = [node for node in ir.load(found).graph if node.op_type == "If"]
    products = [node.op_type for branch in branches for node in branch.attributes["then_branch"].as_graph()]
    assert products.count("MatMulNBits") == 3 * 6


def test_routed_graph_equals_pytorch_when_a_config_lies_beside_it(graph, tmp_path):
    shutil.copytree(graph("fp32").parent, tmp_path / "graph")
    checkpoint = graph("fp32").parents[1] / "checkpoint"
    shutil.copy(checkpoint / "config.json", tmp_path / "graph")
    path = tmp_path / "graph" / "model.onnx"
    result = exported(path, tmp_path / "out", adapter=save_routed_adapter(path, tmp_path / "adapter"))
    assert result.description.parity.verdict == "PASS", result.parity_summary
    assert "against PyTorch" in result.parity_summary


@pytest.mark.parametrize("lowering", ["compact", "if"])
def test_attention_of_skipped_tokens_is_pytorchs_when_they_leave_their_keys(graph, lowering, tmp_path):
    shutil.copytree(graph("fp32, apart").parent, tmp_path / "graph")
    shutil.copy(graph("fp32, apart").parents[1] / "checkpoint" / "config.json", tmp_path / "graph")
    path = tmp_path / "graph" / "model.onnx"
    adapter = save_routed_adapter(path, tmp_path / "adapter", routing="attention")
    parity = exported(path, tmp_path / "out", adapter=adapter, lowering=lowering).parity_summary
    assert "parity PASS" in parity, parity
    assert "against PyTorch" in parity


@pytest.mark.parametrize("form", ["fp32", "fp32, apart", "int4, apart", "int4, DequantizeLinear"])
def test_projections_are_skipped_when_attention_serves_all_tokens(graph, form, tmp_path):
    adapter = save_routed_adapter(graph(form), tmp_path / "adapter", routing="attention")
    prepared = open_source(graph(form), adapter)
    found = {lowering: build_model(prepared, lowering) for lowering in ("masked", "compact", "if")}
    active = np.random.default_rng(2).random((1, SEQUENCE)) < 0.5
    for lowering, model in found.items():
        outputs, rows = run_forced(model, active, graph(form).parent, tmp_path)
        # Norms are fused around all three forms alike: what 8-bit products round does not differ.
        found[lowering] = outputs
        wanted = int(active.sum()) if lowering == "compact" else SEQUENCE
        assert {size for sizes in rows.values() for size in sizes} == {wanted}, lowering
        assert len(rows["o_proj"]) == 6
        assert ("q_proj" in rows) == ("apart" in form)
    for lowering in ("compact", "if"):
        for name, value in found[lowering].items():
            np.testing.assert_allclose(value, found["masked"][name], rtol=0, atol=1e-5, err_msg=f"{lowering} {name}")


@pytest.mark.parametrize("lowering", ["compact", "if"])
def test_steps_of_no_active_token_project_nothing_when_attention_serves_all(graph, lowering, tmp_path):
    path = graph("int4, apart")
    adapter = save_routed_adapter(path, tmp_path / "adapter", routing="attention")
    model = build_model(open_source(path, adapter), lowering)
    _, rows = run_forced(model, np.zeros((1, SEQUENCE), bool), path.parent, tmp_path)
    assert {size for role in ("q_proj", "o_proj") for size in rows.get(role, ())} <= {0}


def run_forced(model, active, folder, profiles):
    """Outputs of a graph that is told who is active, and by role how many rows its attention's projections saw."""
    ir.save(exposed(model, force=True), profiles / "told.onnx", external_data="told.data")
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix, options.log_severity_level = True, str(profiles / "p"), 4
    session = ort.InferenceSession(profiles / "told.onnx", options)
    inputs = {value.name for value in session.get_inputs()}
    feeds = {"input_ids": np.arange(5, 5 + SEQUENCE)[np.newaxis], "attention_mask": np.ones((1, SEQUENCE), np.int64)}
    feeds |= {name: np.zeros((1, 2, 0, 16), np.float32) for name in inputs if name.startswith("past")}
    feeds |= {name: active for name in inputs if name.startswith("force_active")}
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    rows = collections.defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        role = next((role for role in ("q_proj", "o_proj") if role in event["name"]), None)
        operands = event.get("args", {}).get("input_type_shape")
        if role is not None and event["name"].endswith("_kernel_time") and event["args"]["op_name"] in PRODUCTS:
            (shape,) = operands[0].values()
            rows[role].append(int(np.prod(shape[:-1])))
    return outputs, rows


PRODUCTS = ("MatMul", "MatMulNBits", "FusedMatMul", "Gemm")


def test_routed_graph_equals_its_checkpoint_when_one_is_given(graph, tmp_path):
    path = graph("fp32")
    adapter = save_routed_adapter(path, tmp_path / "adapter")
    exported(path, tmp_path / "out", adapter=adapter, parity=False)
    with contextlib.closing(open_source(path.parents[1] / "checkpoint", adapter)) as source:
        report = check_parity(source, tmp_path / "out", open_description(tmp_path / "out"))
    assert (report.verdict, report.reference) == ("PASS", "PyTorch"), report.summary()


def test_whole_layers_are_refused_when_their_attention_has_no_mask(graph, tmp_path):
    path = graph("fp32")
    routers = {f"model.routers.{layer}.weight": ArrayTensor(np.ones((1, 64), np.float32)) for layer in range(3)}
    save_adapter(DloAdapter("layer", (True,) * 3, tensors=routers), tmp_path / "adapter")
    with pytest.raises(GraphPassError, match="RouteLayersPass: the graph has no Attention node"):
        exported(path, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


FAMILIES = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def save_relative(folder, family):
    """A tiny checkpoint of another family with the same block, or nearly."""
    config, model = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": BYTE_VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    made = model(config(**sizes, **heads, tie_word_embeddings=False))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # they start as zeros, which the builder leaves out
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder)
    save_byte_tokenizer(folder, BYTE_VOCABULARY)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def relative(request, tmp_path_factory):
    """A graph of such a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, build(save_relative(folder / "checkpoint", request.param), folder / "graph", "int4")


def test_other_families_are_routed_and_deepened_as_far_as_their_weights_have_names(relative, tmp_path):
    family, path = relative
    rng = np.random.default_rng(0)
    routers = {
        f"model.routers.{layer}.weight": ArrayTensor(rng.standard_normal((1, 64), dtype=np.float32))
        for layer in range(3)
    }
    save_adapter(DloAdapter("mlp", (True,) * 3, tensors=routers), tmp_path / "routers")
    result = exported(path, tmp_path / "routed", adapter=tmp_path / "routers")
    assert result.description.parity.verdict == "PASS", result.parity_summary
    assert exported(path, tmp_path / "deepened").description.parity.verdict == "PASS"
    named = open_foreign_graph(path).tensors
    assert any(".q_norm." in name for name in named) == (family == "qwen3")


@pytest.mark.parametrize(("family", "missing"), [("qwen2", "q_proj.bias"), ("qwen3", "q_norm")])
def test_layers_of_other_weights_are_refused_when_they_are_injected(tmp_path, family, missing):
    path = build(save_relative(tmp_path / "model", family), tmp_path / "graph", "fp32")
    injection = save_tiny_llama(tmp_path / "llama", hidden=64, intermediate=96, vocab=BYTE_VOCABULARY)
    with contextlib.closing(open_source(injection, None)) as llama:
        save_adapter(expansion_adapter(llama.tensors(), placements("tli", 3, every=1)), tmp_path / "layers")
    with pytest.raises(InputError, match=missing):
        exported(path, tmp_path / "deepened", adapter=tmp_path / "layers")
    assert not (tmp_path / "deepened").exists()


def test_norms_inside_of_attention_are_copied_and_left_to_providers_that_have_them(tmp_path):
    checkpoint = save_relative(tmp_path / "model", "qwen3")
    path = build(checkpoint, tmp_path / "graph", "fp16")
    assert set(open_foreign_graph(path).tensors) == set(load_file(checkpoint / "model.safetensors"))
    parity = exported(path, tmp_path / "out").description.parity
    assert (parity.verdict, "norms no queries and keys" in parity.reason) == ("NOT RUN", True)
    new = ir.load(tmp_path / "out" / "model.onnx").graph
    assert all(name in new.initializers for name in (f"model.layers.{i}.self_attn.q_norm.weight" for i in (1, 3, 5)))
    with OnnxRuntimeRunner(tmp_path / "out" / "model.onnx") as runner, pytest.raises(StepError, match="q_norm_weight"):
        generate(runner, [[5, 6]], max_new_tokens=1)  # or the table of gaps would say too much


SAID = {
    "fp32": "attention GroupQueryAttention; weights float; q_proj+k_proj+v_proj packed",
    "int4, gate and up packed": "weights 4 bits in blocks of 32; q_proj+k_proj+v_proj packed; gate_proj+up_proj packed",
    "int4, DequantizeLinear": "weights 4 bits in blocks of 32 (DequantizeLinear); q_proj+k_proj+v_proj packed",
    "int8": "weights 8 bits in blocks of 32; q_proj+k_proj+v_proj packed",
}


@pytest.mark.parametrize(("form", "said"), SAID.items(), ids=SAID)
def test_inspection_says_how_the_layers_are_written(graph, form, said, capsys):
    app(["inspect", str(graph(form))], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "layers 0 to 2: attention GroupQueryAttention" in shown
    assert said in shown


def test_inspection_names_the_layer_and_what_stands_there_when_weights_are_not_told_apart(graph, tmp_path, capsys):
    shutil.copytree(graph("int4").parent, tmp_path / "graph")
    model = ir.load(tmp_path / "graph" / "model.onnx")
    (broken,) = [node for node in model.graph if node.name == "/model/layers.1/mlp/up_proj/MatMul_Q4"]
    broken.attributes.add(ir.AttrInt64("weight_prepacked", 1))
    ir.save(model, tmp_path / "graph" / "model.onnx")
    app(["inspect", str(tmp_path / "graph" / "model.onnx")], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "layer 1: attention GroupQueryAttention; weights not told apart projections of layer 1: " in shown
    assert "up_proj/MatMul_Q4': its weight has attribute weight_prepacked; expected codes of 2, 4 or 8 bits" in shown


def test_genai_config_goes_with_the_graph_and_counts_its_layers(graph, tmp_path):
    path = graph("int4")
    before = json.loads((path.parent / "genai_config.json").read_text())
    save_adapter(
        expansion_adapter(open_foreign_graph(path).tensors, placements("tli", 3, every=1)), tmp_path / "adapter"
    )
    export_model(ExportRequest(str(path), tmp_path / "out", adapter=tmp_path / "adapter", parity=False), Reporter())
    after = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert after["search"]["past_present_share_buffer"] is True
    assert after["model"]["decoder"].pop("num_hidden_layers") == 6
    assert before["model"]["decoder"].pop("num_hidden_layers") == 3
    assert after == before


def test_graph_is_taken_when_a_tool_has_renamed_its_logits_and_says_nothing_of_its_values(graph, tmp_path):
    # Olive leaves a graph so when it quantises the head: its output is called after the new node.
    shutil.copytree(graph("int4, tied").parent, tmp_path / "graph")
    path = tmp_path / "graph" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for names in (node.output for node in model.graph.node):
        names[:] = [f"{name}_Q4" if name == "logits" else name for name in names]
    next(value for value in model.graph.output if value.name == "logits").name = "logits_Q4"
    del model.graph.value_info[:]
    (own,) = [entry for entry in model.opset_import if entry.domain]
    model.opset_import.remove(own)  # ONNX Runtime does without
    onnx.save(model, path)
    settings = path.with_name("genai_config.json")
    settings.write_text(settings.read_text().replace('"logits": "logits"', '"logits": "logits_Q4"'))
    result = exported(path, tmp_path / "deepened")
    assert result.description.parity.verdict == "PASS", result.parity_summary
    found = json.loads((tmp_path / "deepened" / "genai_config.json").read_text())["model"]["decoder"]
    assert found["outputs"]["logits"] == "logits"
    exported(path, tmp_path / "routed", adapter=save_routed_adapter(path, tmp_path / "adapter"), parity=False)
    assert np.isfinite(logits(tmp_path / "routed" / "model.onnx")).all()


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_onnxruntime_genai_runs_the_routed_graph_as_it_ran_the_first(graph, kind, tmp_path):
    path = graph("int4")
    adapter = save_routed_adapter(path, tmp_path / "adapter", routing=kind)
    exported(path, tmp_path / "out", adapter=adapter, parity=False)
    prompt = list(range(5, 14))
    with OnnxRuntimeRunner(tmp_path / "out" / "model.onnx") as runner:
        (wanted,) = generate(runner, [prompt], max_new_tokens=8).sequences
    assert genai_tokens(tmp_path / "out", prompt, 8) == wanted
    assert genai_tokens(path.parent, prompt, 8) != wanted  # it is routed


def genai_tokens(folder, prompt, count):
    """Greedy tokens of onnxruntime-genai, its cache in one shared buffer."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()[len(prompt) :]


def test_runner_refuses_padding_when_attention_counts_tokens(graph, tmp_path):
    path = graph("fp32")
    exported(path, tmp_path / "out", adapter=save_routed_adapter(path, tmp_path / "adapter"), parity=False)
    with (
        OnnxRuntimeRunner(tmp_path / "out" / "model.onnx") as runner,
        pytest.raises(StepError, match="counts tokens") as error,
    ):
        generate(runner, [[5, 6, 7], [8, 9]], max_new_tokens=2)
    assert "sequences of one length" in error.value.hint


def test_settings_beside_the_graph_are_refused_when_they_are_of_another(graph, tmp_path):
    shutil.copytree(graph("fp32").parent, tmp_path / "graph")
    file = tmp_path / "graph" / "genai_config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 4, model\.onnx has 3 layers"):
        open_foreign_graph(tmp_path / "graph" / "model.onnx")


def test_settings_beside_the_graph_are_refused_when_options_are_no_object(graph, tmp_path):
    shutil.copytree(graph("fp32").parent, tmp_path / "graph")
    file = tmp_path / "graph" / "genai_config.json"
    settings = json.loads(file.read_text())
    settings["model"]["decoder"]["session_options"] = None
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"genai_config\.json: model\.decoder\.session_options is null"):
        open_foreign_graph(tmp_path / "graph" / "model.onnx")
