"""The graph whose cache ONNX Runtime writes in place, against PyTorch, a growing cache, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.dtypes import FLOAT32
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.pipeline import exposed, prepare_released
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.target_graphs import build_captured_model
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.exporter.weight_file import save_weights
from dlo_export.graph_passes.cache.use_group_query_attention import UseGroupQueryAttentionPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, ROUTER_SCORES, role_values
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.onnxruntime.in_place_runner import InPlaceRunner
from dlo_export.runtimes.parity.cases import LONGEST_CASE, Case, step_feeds
from dlo_export.runtimes.parity.compare import Candidate, compare
from dlo_export.runtimes.torch.reference import open_reference
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.exporter.forked_commands import run
from tests.plugins.ort_library import built_library
from tests.tiny_families import LAYERS, ORIGINAL_CONTEXT, ROPES, save_tiny_family
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

SLOTS = 32
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
SHAPE = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}


def source_of(folder: Path, **options: object) -> ExportSource:
    return open_source(str(save_tiny_llama(folder, **{**SHAPE, **options})), None)  # type: ignore[arg-type]


class Graphs:
    """A captured graph with its weights in a folder, as released and as parity looks into it."""

    def __init__(self, source: ExportSource, lowering: str, folder: Path, slots: int = SLOTS) -> None:
        model = build_captured_model(source, lowering, slots)
        save_weights(model, folder / "model.onnx.data")
        self.model, self.folder = model, folder
        self.library = built_library() if lowering == "plugin" else None

    def runner(self, **exposure: bool) -> InPlaceRunner:
        model = exposed(self.model, **exposure) if exposure else self.model
        serialized = ir.to_proto(model).SerializeToString()
        return InPlaceRunner(serialized, threads=1, weights_folder=self.folder, plugin_library=self.library)


@pytest.mark.parametrize(
    ("lowering", "options"),
    [
        ("none", {"tie": True}),
        ("none", {"attention_bias": True, "rope": "llama3"}),
        ("masked", {"routed": (True, False, True), "rope": "linear"}),
        ("plugin", {"routed": (True, False, True), "tie": True}),
    ],
    ids=str,
)
def test_graph_agrees_with_pytorch_when_steps_are_ragged(
    tmp_path: Path, lowering: str, options: dict[str, object]
) -> None:
    source = source_of(tmp_path / "model", **options)
    graphs = Graphs(source, lowering, tmp_path)
    ragged = [np.array(prompt) for prompt in PROMPTS]
    cases = [Case("prefill", step_feeds(ragged)), Case("chunk and decode", step_feeds(ragged, 3, 1, 1))]
    routed = source.routing is not None
    if routed:
        cases += [Case("mixed decisions", step_feeds(ragged, 2, 1), "mixed")]
    checkpoint = source.base.checkpoint
    with open_reference(checkpoint.config.raw, checkpoint.tensors) as reference:
        candidate = Candidate(
            "in place",
            lambda: graphs.runner(force=False, streams=True),
            (lambda: graphs.runner(force=True, streams=False)) if routed else None,
        )
        report = compare(reference, [candidate], cases, dtype="fp32", greedy_prompts=PROMPTS, greedy_tokens=6)
    assert report, report.summary()


def test_tokens_are_the_same_when_a_runner_is_used_again_for_another_batch(tmp_path: Path) -> None:
    graphs = Graphs(source_of(tmp_path / "model"), "none", tmp_path)
    with graphs.runner() as used:
        first = [generate(used, prompts, max_new_tokens=5).sequences for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    with graphs.runner() as fresh:
        alone = generate(fresh, PROMPTS[:1], max_new_tokens=5).sequences
    assert first[0] == first[2]
    assert first[1] == alone == first[0][:1]


@pytest.mark.parametrize("routed", [None, (True, False, True)], ids=["dense", "routed"])
def test_generation_goes_on_when_a_sequence_has_ended_with_its_last_slot_taken(
    tmp_path: Path, routed: tuple[bool, ...] | None
) -> None:
    graphs = Graphs(source_of(tmp_path / "model", routed=routed), "masked" if routed else "none", tmp_path)
    prompts = [np.random.default_rng(0).integers(3, 97, SLOTS).tolist(), *PROMPTS]
    with graphs.runner() as runner:
        ((end,),) = generate(runner, prompts[:1], max_new_tokens=1).sequences
        wanted = [generate(runner, [prompt], max_new_tokens=12, end_tokens={end}).sequences[0] for prompt in prompts]
        assert generate(runner, prompts, max_new_tokens=12, end_tokens={end}).sequences == wanted
        assert len(wanted[0]) == 1 < max(map(len, wanted))
        with pytest.raises(StepError, match=rf"sequence 0 has {SLOTS} tokens in it and the step adds 1"):
            generate(runner, prompts, max_new_tokens=12)


def test_last_logits_are_the_last_of_all_when_steps_are_ragged_and_some_sequence_has_none(tmp_path: Path) -> None:
    graphs = Graphs(source_of(tmp_path / "model"), "none", tmp_path)
    found = []
    with graphs.runner() as runner:
        for last_logits in (False, True):
            runner.reset(len(PROMPTS))
            found.append(
                [
                    runner.step(fed.input_ids, fed.attention_mask, fed.position_ids, last_logits=last_logits).logits
                    for fed in step_feeds([np.array(prompt) for prompt in PROMPTS], 3, 1)
                ]
            )
    assert [logits.shape[1] for logits in found[1]] == [1, 1, 1]
    for whole, last in zip(*found, strict=True):
        np.testing.assert_array_equal(last, whole[:, -1:])
    assert not found[1][0][1].any()  # of nothing but padding


def test_slots_are_zeros_until_they_are_filled(tmp_path: Path) -> None:
    """CUDA's attention multiplies what nobody has filled by 0."""
    graphs = Graphs(source_of(tmp_path / "model"), "none", tmp_path)
    with graphs.runner() as runner:
        for batch in (1, 3, 2):
            runner.reset(batch)
            for memory in runner._cache.values():
                assert not memory.read(FLOAT32, (memory.bytes // 4,)).any()


def test_runner_refuses_when_positions_are_others(tmp_path: Path) -> None:
    graphs = Graphs(source_of(tmp_path / "model"), "none", tmp_path)
    with graphs.runner() as runner:
        runner.reset(1)
        ids = np.array([[3, 1]])
        with pytest.raises(StepError, match="counted from 0"):
            runner.step(ids, np.ones((1, 2), np.int64), np.array([[4, 5]]))


def test_layers_are_found_when_attention_is_onnxruntimes(tmp_path: Path) -> None:
    model = build_captured_model(source_of(tmp_path / "model"), "none", SLOTS)
    assert [value.name for value in model.graph.inputs][:2] == ["input_ids", "kv_lengths"]
    operators = Counter(node.op_type for node in model.graph)
    assert not operators.keys() & {"Cos", "RotaryEmbedding", "Split"}
    # Every norm adds first, the first one zeros.
    assert (operators["SkipSimplifiedLayerNormalization"], operators["ConstantOfShape"]) == (7, 1)
    assert not operators.keys() & {"Add", "RMSNormalization"}
    assert len(find_decoder_layers(prepare_released(model).graph)) == 3
    operators = Counter(node.op_type for node in model.graph)
    assert (operators["RMSNormalization"], operators["Add"], operators["ConstantOfShape"]) == (7, 6, 0)


@pytest.mark.parametrize(
    ("family", "left"),
    [("qwen2", {}), ("qwen3", {"RMSNormalization": 2 * LAYERS}), ("olmo2", {"RMSNormalization": 4 * LAYERS})],
)
def test_norms_of_heads_and_branches_stay_when_those_of_the_stream_are_fused(
    family: str, left: dict[str, int], tmp_path: Path
) -> None:
    save_tiny_family(tmp_path / "model", family, head_dim=16)
    request = ExportRequest(str(tmp_path / "model"), tmp_path / "out", static_cache=LONGEST_CASE * 2)
    result = export_model(request, Reporter())
    assert result.description.parity.verdict == "PASS", result.parity_summary
    operators = Counter(node.op_type for node in ir.load(result.folder / "model.onnx").graph)
    assert {name: count for name, count in operators.items() if name == "RMSNormalization"} == left


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.BFLOAT16])
def test_routers_are_one_operator_when_the_library_is_needed_anyway(tmp_path: Path, dtype: ir.DataType) -> None:
    source = source_of(tmp_path / "model", routed=(True, False, True), rescale=False)
    for fuse, lowering in ((True, "plugin"), (False, "plugin"), (True, "masked")):
        model = build_captured_model(source, lowering, SLOTS, dtype, fuse_routers=fuse)
        fused = fuse and lowering == "plugin"
        scores = role_values(model.graph, ROUTER_SCORES)
        assert sorted(scores) == [0, 2]
        assert {value.producer().op_type for value in scores.values()} == {"RouterScores" if fused else "Sigmoid"}
        others = [node.op_type for node in model.graph if node.metadata_props.get(LAYER_KEY) == "0"]
        assert others.count("Squeeze") == (0 if fused else 1)


@pytest.mark.parametrize(
    ("lowering", "slots", "reason"),
    [("compact", 32, "--lowering compact"), ("if", 32, "--lowering if"), ("masked", 0, "a cache of 0 slots")],
)
def test_pipeline_refuses_by_name_when_a_step_cannot_be_captured(
    tmp_path: Path, lowering: str, slots: int, reason: str
) -> None:
    source = source_of(tmp_path / "model", routed=(True, False, True))
    with pytest.raises(InputError, match=reason):
        build_captured_model(source, lowering, slots)


def test_pipeline_refuses_whole_layers_when_they_are_routed(tmp_path: Path) -> None:
    source = source_of(tmp_path / "model", routed=(True, False, True), model_type="llama_dlo")
    with pytest.raises(InputError, match="layer routing skips or masks attention") as error:
        build_captured_model(source, "masked", SLOTS)
    assert error.value.hint == "export without it", "no lowering changes that"


def test_pass_refuses_with_all_layers_when_heads_are_too_narrow(tmp_path: Path) -> None:
    source = source_of(tmp_path / "model", hidden=32, heads=4, kv_heads=2, head_dim=8)
    with pytest.raises(GraphPassError, match="has heads of 8, expected a multiple of 16") as error:
        build_captured_model(source, "none", SLOTS)
    assert "attention of layers 0, 1, 2: has heads of 8" in error.value.message


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", ROPES["yarn"]),  # its tables are scaled
        ("smollm3", {"attention_bias": True, "num_hidden_layers": 3}),  # its second layer rotates nothing
        ("qwen3", {"num_hidden_layers": 2}),
    ],
    ids=str,
)
def test_artefact_equals_pytorch_when_tables_are_scaled_or_a_layer_has_none(
    tmp_path: Path, family: str, values: dict[str, object]
) -> None:
    save_tiny_family(tmp_path / "model", family, **{**values, "head_dim": 16})
    result = export_model(ExportRequest(str(tmp_path / "model"), tmp_path / "out", static_cache=48), Reporter())
    assert result.description.parity.verdict == "PASS"
    attentions = [node for node in ir.load(result.folder / "model.onnx").graph if node.op_type == "GroupQueryAttention"]
    rotates = [node.attributes["do_rotary"].as_int() for node in attentions]
    assert rotates == ([1, 0, 1] if family == "smollm3" else [1] * len(attentions))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_ropes_that_change_behind_a_context_are_those_of_pytorch_up_to_it(tmp_path: Path, rope: str) -> None:
    values = json.loads(json.dumps(ROPES[rope]))
    for name in ("short_factor", "long_factor"):
        if name in values["rope_parameters"]:
            values["rope_parameters"][name] *= 2  # one for each pair of a head of 16
    save_tiny_family(tmp_path / "model", "llama", **values, head_dim=16)
    source = open_source(str(tmp_path / "model"), None)
    with pytest.raises(GraphPassError, match=rf"change for whole steps behind {ORIGINAL_CONTEXT} tokens") as error:
        build_captured_model(source, "none", ORIGINAL_CONTEXT + 1)
    assert "a cache of as many slots can be had, not of 17" in str(error.value)
    graphs = Graphs(source, "none", tmp_path, ORIGINAL_CONTEXT)
    assert not {"ReduceMax", "Pow", "Where"} & {node.op_type for node in graphs.model.graph}
    ids = np.arange(3, 3 + ORIGINAL_CONTEXT)[np.newaxis]
    with graphs.runner() as runner, TorchRunner.from_folder(tmp_path / "model", masked=False) as reference:
        logits = []
        for each in (runner, reference):
            each.reset(1)
            cuts = [(0, 9), *((stop - 1, stop) for stop in range(10, ORIGINAL_CONTEXT + 1))]
            steps = [
                each.step(ids[:, start:stop], np.ones((1, stop), np.int64), np.arange(start, stop)[np.newaxis])
                for start, stop in cuts
            ]
            logits.append(np.concatenate([step.logits for step in steps], axis=1))
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=5e-5)


def test_pass_names_what_the_rotation_is_when_it_cannot_be_looked_up(tmp_path: Path) -> None:
    model = source_of(tmp_path / "model").plain_model(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cos":
            node.op_type = "Exp"
    with pytest.raises(GraphPassError, match="its tables are not cosine and sine of position_ids times 8 constants"):
        UseGroupQueryAttentionPass(SLOTS)(model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "model"
    return save_tiny_llama(folder, **SHAPE, routed=(True, False, True), thresholds={2: 0.4})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(model: Path) -> ExportResult:
    request = ExportRequest(
        str(model), model.with_name("plugin"), lowering="plugin", static_cache=48, ort_plugin_library=built_library()
    )
    return export_model(request, Reporter())


def test_artefact_equals_pytorch_and_says_so_when_its_cache_is_static(exported: ExportResult) -> None:
    description = exported.description
    assert (description.lowering, description.capture_problem) == ("plugin", None)
    assert description.parity.verdict == "PASS"
    inputs = {spec.name: spec for spec in description.interface.inputs}
    assert list(inputs)[:2] == ["input_ids", "kv_lengths"]
    assert inputs["past_key_values.0.key"].shape == ("batch_size", 2, 48, 16)
    assert not (exported.folder / "genai_config.json").exists()


def test_greedy_tokens_are_pytorchs_when_prompts_are_padded(model: Path, exported: ExportResult) -> None:
    with (
        open_artefact(exported.folder, plugin_library=built_library()) as runner,
        TorchRunner.from_folder(model, masked=True) as reference,
    ):
        found, wanted = (generate(each, PROMPTS, max_new_tokens=12) for each in (runner, reference))
    assert found.sequences == wanted.sequences
    assert found.stats.active_rate == wanted.stats.active_rate


def test_logits_are_those_of_one_sequence_when_it_is_forked(exported: ExportResult) -> None:
    ids = np.array([PROMPTS[2]])
    with open_artefact(exported.folder, plugin_library=built_library()) as runner:
        logits = []
        for branches in (1, 3):
            runner.reset(1)
            runner.step(ids[:, :5], np.ones((1, 5), np.int64), np.arange(5)[np.newaxis])
            runner.fork(branches)
            rest = np.repeat(ids[:, 5:], branches, 0)
            positions = np.repeat(np.arange(5, 8)[np.newaxis], branches, 0)
            logits.append(runner.step(rest, np.ones((branches, 8), np.int64), positions).logits)
    np.testing.assert_array_equal(logits[1], np.repeat(logits[0], 3, 0))


def test_runner_names_the_option_when_the_cache_is_full(exported: ExportResult) -> None:
    with open_artefact(exported.folder, plugin_library=built_library()) as runner:
        runner.reset(1)
        with pytest.raises(StepError, match=r"the cache is full[\s\S]*--static-cache 49 or more"):
            runner.step(np.zeros((1, 49), np.int64), np.ones((1, 49), np.int64), np.arange(49)[np.newaxis])


def test_export_refuses_by_option_when_a_static_cache_does_not_go_with_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--static-cache and --trt"):
        ExportRequest(str(model), tmp_path / "out", static_cache=32, trt=TensorRtRequest())
    refused = {
        "no float32 attention": {"provider": "cuda", "dtype": "fp32"},
        "--lowering compact: the number of active tokens": {"provider": "cuda", "dtype": "fp16", "lowering": "compact"},
    }
    for reason, options in refused.items():
        request = ExportRequest(str(model), tmp_path / "out", static_cache=32, **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=reason):
            export_model(request, Reporter())
        assert not (tmp_path / "out").exists()


def test_bench_and_evaluate_feed_what_fits_when_the_cache_is_short(tmp_path: Path) -> None:
    sizes = SHAPE | {"routed": (True, True), "vocab": BYTE_VOCABULARY, "tokenizer": True}
    save_tiny_llama(tmp_path / "model", layers=2, **sizes)
    request = ExportRequest(
        str(tmp_path / "model"), tmp_path / "out", parity=False, lowering="masked", static_cache=SLOTS
    )
    export_model(request, Reporter())
    (tmp_path / "text.txt").write_text("Some words of a text that is long enough. " * 400)
    text = ("--text", tmp_path / "text.txt")
    steps = ("--rounds", "1", "--decode-tokens", "2", "--prompt-tokens")
    timed = run("bench", tmp_path / "out", *text, *steps, SLOTS - 2, "--perplexity", 64, "--json")
    assert timed.returncode == 0, timed.stderr
    (row,) = json.loads(timed.stdout)["artefacts"]
    assert 0 < row["active_rate"]["original"] < 1
    assert row["perplexity"] > 1
    longer = run("bench", tmp_path / "out", *text, *steps, SLOTS - 1)
    assert (longer.returncode, f"--static-cache {SLOTS + 1} or more" in longer.stderr) == (2, True), longer.stderr
    scored = run("evaluate", tmp_path / "out", *text, "--limit", 2, "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["settings"]["sequence"] == SLOTS
    longer = run("evaluate", tmp_path / "out", *text, "--sequence", SLOTS + 1)
    assert (longer.returncode, f"its static cache holds {SLOTS} tokens" in longer.stderr) == (2, True), longer.stderr
