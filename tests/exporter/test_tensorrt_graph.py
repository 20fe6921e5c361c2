"""TensorRT's graph, run by ONNX Runtime in fp32, against the masked oracle on ONNX Runtime's own interface."""

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.checkpoints.interface import is_state_input
from dlo_export.checkpoints.model_types import kv_keys
from dlo_export.exporter.pipeline import TensorRtOptions, run_steps, tensorrt_steps
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model, build_tensorrt_model
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from tests.bare_session import left_padded
from tests.static_session import StaticSession, runnable
from tests.tiny_families import ORIGINAL_CONTEXT, ROPES, save_tiny_family
from tests.tiny_models import save_tiny_llama

DATA = Path(__file__).parents[1] / "data"
LENGTHS, DECODED, TOLERANCE = (9, 4, 6), 8, 5e-4
OPTIONS = {"max_batch": 3, "max_sequence": 9, "max_cache": 24}


KINDS = ["mlp", "layer", "attention", "attention-active"]
# What tokens skip, and what is to make them do so; plugins are for MLPs. Of these, TensorRT builds no 16-bit engine of
# attention alone in an If, and the exporter refuses it: the graph is right all the same.
CASES = [(kind, lowering) for kind in KINDS for lowering in ("masked", "compact", "if")]
CASES += [("mlp", "plugin"), ("layer", "plugin")]


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    folder = DATA / f"reference_{request.param}_routed"
    if not folder.exists():
        kept = kv_keys(request.param)["attention_routing_kv"]
        options = {"model_type": "llama_dlo_attn", "routing_kv": kept, "scale_gap": 0.4}
        folder = save_tiny_llama(tmp_path_factory.mktemp("model"), routed=[True, False, True], **options)
    source = open_source(str(folder), None)
    yield source
    source.close()


only_mlps = pytest.mark.parametrize("source", ["mlp"], indirect=True)


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, length + DECODED) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(source, sequences):
    """Logits and scores of every token of every sequence alone, by the masked graph."""
    model = build_model(source, "masked")
    ExposeRoutingPass()(model)

    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    found = []
    for tokens in sequences:
        empty = {
            value.name: np.zeros(
                [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])],
                np.float32 if "float" in value.type else bool,
            )
            for value in session.get_inputs()
            if is_state_input(value.name)
        }
        ids = tokens[np.newaxis]
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[np.newaxis]}
        found.append(dict(zip(names, session.run(None, feeds | empty), strict=True)))
    return found


@pytest.mark.parametrize("last_logits", [False, True], ids=["all-logits", "last-logits"])
@pytest.mark.parametrize(("source", "lowering"), CASES, indirect=["source"])
def test_tensorrt_graph_equals_the_masked_oracle_when_batch_is_ragged(
    source, sequences, expected, lowering, last_logits
):
    options = TensorRtOptions(lowering, last_logits=last_logits, **OPTIONS)
    model = run_steps(source.plain_model(ir.DataType.FLOAT), tensorrt_steps(source, options))
    ExposeRoutingPass()(model)
    session = StaticSession(model, len(LENGTHS))
    steps = [LENGTHS, *[(1,) * len(LENGTHS)] * DECODED]
    decided = set()
    for counts in steps:
        starts = session.lengths
        outputs = session.step([row[a : a + n] for row, a, n in zip(sequences, starts, counts, strict=True)])
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            wanted = expected[b]
            end = start + count
            got = outputs["logits"][b, :1] if last_logits else outputs["logits"][b, :count]
            logits = wanted["logits"][0, end - 1 : end] if last_logits else wanted["logits"][0, start:end]
            np.testing.assert_allclose(got, logits, rtol=0, atol=TOLERANCE)
            for name in (name for name in wanted if name.startswith("router_scores")):
                active = outputs[name][b, :count] > 0.5
                np.testing.assert_array_equal(active, wanted[name][0, start:end] > 0.5, err_msg=name)
                decided |= set(active.tolist())
    assert decided == {True, False}, "the comparison must see tokens that run and tokens that skip"


@only_mlps
@pytest.mark.parametrize("lowering", ["compact", "if", "plugin"])
def test_growing_cache_keeps_onnxruntimes_interface_and_results(source, sequences, expected, lowering):
    model = build_tensorrt_model(source, TensorRtOptions(lowering, cache="growing", max_batch=3), ir.DataType.FLOAT)
    names = [value.name for value in model.graph.inputs]
    assert names == [value.name for value in build_model(source, "masked").graph.inputs]
    ids, mask, positions = left_padded([tokens[np.newaxis] for tokens in sequences])

    session = ort.InferenceSession(runnable(model), providers=["CPUExecutionProvider"])
    state = {
        value.name: np.zeros((len(LENGTHS), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    cut = 12
    for a, b in ((0, cut), (cut, ids.shape[1])):
        feeds = {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
        outputs = dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds | state), strict=True))
        state = {name: outputs[name.replace("past_key_values", "present")] for name in state}
        for row, wanted in enumerate(expected):
            first = ids.shape[1] - sequences[row].size
            got, start = outputs["logits"][row], max(a - first, 0)
            real = got[max(first - a, 0) :]
            np.testing.assert_allclose(real, wanted["logits"][0, start : b - first], rtol=0, atol=TOLERANCE)


@only_mlps
def test_compaction_is_cut_into_chunks_when_more_tokens_than_one_topk_selects(source, expected, sequences, monkeypatch):
    monkeypatch.setattr("dlo_export.graph_passes.lowerings.chosen_rows.MOST_SELECTED", 8)
    model = build_tensorrt_model(source, TensorRtOptions("compact", **OPTIONS), ir.DataType.FLOAT)
    assert sum(node.op_type == "TopK" for node in model.graph) == 3 * 4  # routed layers, chunks
    session = StaticSession(model, len(LENGTHS))
    for counts in (LENGTHS, (1,) * len(LENGTHS)):
        starts = session.lengths
        outputs = session.step([row[a : a + n] for row, a, n in zip(sequences, starts, counts, strict=True)])
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            wanted = expected[b]["logits"][0, start : start + count]
            np.testing.assert_allclose(outputs["logits"][b, :count], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_at_padding_change_nothing_when_frequencies_depend_on_the_length(rope, sequences, tmp_path):
    save_tiny_family(tmp_path / "model", "llama", **ROPES[rope])
    with closing(open_source(str(tmp_path / "model"), None)) as source:
        model = build_tensorrt_model(source, TensorRtOptions("none", **OPTIONS), ir.DataType.FLOAT)
        session = StaticSession(model, len(LENGTHS))
    columns = np.arange(max(LENGTHS))
    logits = []
    for at_padding in (0, 10 * ORIGINAL_CONTEXT):
        session.lengths[:] = 0
        positions = np.where(columns < np.array(LENGTHS)[:, np.newaxis], columns, at_padding)
        rows = [row[:count] for row, count in zip(sequences, LENGTHS, strict=True)]
        logits.append(session.step(rows, position_ids=positions)["logits"])
    for b, count in enumerate(LENGTHS):
        np.testing.assert_array_equal(logits[0][b, :count], logits[1][b, :count])


@only_mlps
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("lowering", ["compact", "if", "plugin"])
def test_routers_and_norms_compute_in_float32_when_the_graph_is_sixteen_bit(source, lowering, dtype):
    model = build_tensorrt_model(source, TensorRtOptions(lowering, **OPTIONS), dtype)
    for node in model.graph.all_nodes():
        if node.op_type == "RMSNormalization" or (node.name or "").endswith(".products"):
            assert [value.dtype for value in node.inputs] == [ir.DataType.FLOAT] * 2, node.name
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.dtype == (dtype if "." in value.name or value.name == "logits" else ir.DataType.INT64)
