"""Families near Llama, and ropes beyond the context they were made for: transformers' own classes are the truth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import parse_router
from dlo_export.checkpoints.model_types import RoutingKind, leaves_keys
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_tensorrt_model
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.graph_passes.lowerings.registry import skipping_lowerings
from dlo_export.modeling.calibration.layer_stream import LayerStream
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.parameters import choose_parameters
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.runtimes.parity.statistics import logit_statistics
from dlo_export.runtimes.parity.tolerances import TOLERANCES
from tests.bare_session import BareSession
from tests.exporter.forked_commands import run as dlo
from tests.static_session import StaticSession
from tests.tiny_families import FAMILIES, LAYERS, ORIGINAL_CONTEXT, ROPES, route_tiny_family, save_tiny_family

# Ropes that the length, or a factor of their own, changes; the others are in test_llama.py.
LENGTHENED = ("dynamic", "yarn", "yarn with options", "longrope")
# Every rope, every kind of routing, every family and lowering, in few models.
ROUTED_AND_DEEPENED: dict[tuple[str, str], tuple[RoutingKind, str]] = {
    ("llama", "dynamic"): ("layer", "compact"),
    ("smollm3", "dynamic"): ("mlp", "if"),
    ("granite", "yarn"): ("attention-active", "if"),
    ("llama", "yarn with options"): ("attention", "compact"),
    ("qwen2", "longrope"): ("mlp", "compact"),
    ("olmo2", "longrope"): ("layer", "if"),
    ("qwen3", "llama3"): ("attention", "if"),
    ("olmo2", "linear"): ("attention-active", "compact"),
}

CASES: dict[str, dict[str, Any]] = {
    **{family: {"model_type": family} for family in FAMILIES},
    **{f"llama, {rope}": {"model_type": "llama", **ROPES[rope]} for rope in LENGTHENED},
    "qwen3, yarn": {"model_type": "qwen3", **ROPES["yarn"]},
}
# Prefill, a chunk and single tokens, from inside the original context to beyond it.
CUTS = (10, 24, 38, 39, 40)
# The same around the border: one step fills the original context, the next goes one token beyond it.
CUTS_AT_BORDER = (10, ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1, CUTS[-1])
IDS = np.random.default_rng(0).integers(3, 259, (2, CUTS[-1]))
WHOLE = np.ones_like(IDS)
LEFT_PADDED = np.where(np.arange(CUTS[-1]) < [[0], [5]], 0, 1)


def exported(model: Path, **options: Any) -> ExportResult:
    return export_model(ExportRequest(str(model), model.with_name("out"), **options), Reporter())


@torch.no_grad()
def stepwise_logits(model: PreTrainedModel, mask: np.ndarray = WHOLE, cuts: tuple[int, ...] = CUTS) -> np.ndarray:
    """Of transformers' model with its cache: where rope depends on the length, steps are part of what is computed."""
    cache, feeds = DynamicCache(config=model.config), map(torch.from_numpy, (IDS, mask, positions_of(mask)))
    ids, seen, positions = feeds
    pieces = [
        model(
            ids[:, start:stop],
            attention_mask=seen[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for start, stop in zip((0, *cuts[:-1]), cuts, strict=True)
    ]
    return torch.cat(pieces, dim=1).numpy()


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Of tokens behind padding at the left, int64 as the mask."""
    return np.maximum(mask.cumsum(1) - 1, 0)


@pytest.mark.parametrize("case", CASES)
def test_artefact_computes_what_transformers_does_when_the_family_differs_from_llama(tmp_path: Path, case: str) -> None:
    reference = save_tiny_family(tmp_path / "model", **CASES[case])
    result = exported(tmp_path / "model")
    assert result.description.parity.verdict == "PASS"
    assert result.description.source.model_type == CASES[case]["model_type"]
    positions = np.tile(np.arange(CUTS[-1]), (2, 1))
    assert CUTS[-1] > 2 * ORIGINAL_CONTEXT
    found = BareSession(result.folder / "model.onnx").logits_of(IDS, np.ones_like(IDS), positions, CUTS)
    np.testing.assert_allclose(found, stepwise_logits(reference), rtol=1e-5, atol=5e-5)
    client = json.loads((result.folder / "config.json").read_text())
    assert (client["model_type"], client["num_key_value_heads"]) == ("llama", 2)


@pytest.mark.parametrize("case", ["qwen3, yarn", "smollm3", "granite", "olmo2", "llama, dynamic", "llama, longrope"])
def test_tensorrt_graph_computes_what_transformers_does_when_the_family_differs_from_llama(
    tmp_path: Path, case: str
) -> None:
    reference = save_tiny_family(tmp_path / "model", **CASES[case])
    source = open_source(str(tmp_path / "model"), None)
    options = TensorRtOptions("none", max_batch=2, max_sequence=16, max_cache=CUTS[-1])
    session = StaticSession(build_tensorrt_model(source, options, ir.DataType.FLOAT), 2)
    pieces = [session.step(IDS[:, start:stop])["logits"] for start, stop in zip((0, *CUTS[:-1]), CUTS, strict=True)]
    np.testing.assert_allclose(np.concatenate(pieces, 1), stepwise_logits(reference), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("case", ["qwen3, yarn", "llama, dynamic"])
def test_engine_is_built_when_the_family_differs_from_llama(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLO_EXPORT_CACHE", str(tmp_path / "engines"))
    save_tiny_family(tmp_path / "model", **CASES[case], hidden_size=64, head_dim=16)
    if case.startswith("qwen3"):
        route_tiny_family(tmp_path / "model", "mlp")
    trt = TensorRtRequest(targets=("sm89",), max_cache=64, max_sequence=32)
    description = exported(tmp_path / "model", trt=trt).description
    assert description.parity.verdict == "PASS"  # of the engine's fp32 twin, too
    assert [engine.build.backend for engine in description.engines] == ["rtx"]


@pytest.mark.parametrize("routing", get_args(RoutingKind))
@pytest.mark.parametrize("family", FAMILIES)
def test_artefact_equals_pytorch_when_the_family_is_routed(tmp_path: Path, family: str, routing: RoutingKind) -> None:
    save_tiny_family(tmp_path / "model", family)
    route_tiny_family(tmp_path / "model", routing)
    # Both lowerings, over the kinds of routing and the families.
    lowering = "compact" if (routing in ("mlp", "attention")) == (family in ("qwen2", "smollm3")) else "if"
    description = exported(tmp_path / "model", lowering=lowering, parity=False).description
    assert description.routing is not None
    assert (description.routing.kind, description.routing.layers) == (routing, (0, 2, 3))
    source = open_source(str(tmp_path / "model"), None)
    # Norms between the projections and attention, where families differ most: TensorRT's graphs besides.
    graphs = tensorrt_graphs(routing, max_cache=64) if family in ("qwen3", "olmo2") else []
    report = check_parity(source, tmp_path / "out", description, graphs)
    assert report.verdict == "PASS", report.summary()


@pytest.mark.parametrize("routing", get_args(RoutingKind))
@pytest.mark.parametrize("family", FAMILIES)
def test_tensorrt_graph_is_made_in_16_bits_when_the_family_is_routed(
    tmp_path: Path, family: str, routing: RoutingKind
) -> None:
    save_tiny_family(tmp_path / "model", family)
    route_tiny_family(tmp_path / "model", routing)
    source = open_source(str(tmp_path / "model"), None)
    for options in tensorrt_graphs(routing):
        model = build_tensorrt_model(source, options, ir.DataType.BFLOAT16)
        assert {value.dtype for value in model.graph.outputs} == {ir.DataType.BFLOAT16}
        # Around the norms, in 16 bits, are casts: projections must be found behind those too.
        skips = {"TopK", "If"} & {node.op_type for node in model.graph}
        assert skips == {{"compact": "TopK", "if": "If"}[options.lowering]}


def tensorrt_graphs(routing: RoutingKind, **sizes: int) -> list[TensorRtOptions]:
    """With each lowering that every family has: kernels compute MLPs of Llama's form alone."""
    found = (record for record in skipping_lowerings("tensorrt") if routing in record.routing and not record.domains)
    return [TensorRtOptions(record.name, max_batch=2, max_sequence=64, **sizes) for record in found]


def test_model_opens_by_its_own_name_when_the_family_is_routed(tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "qwen3")
    route_tiny_family(tmp_path / "model", "layer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (type(model).__name__, model.config.model_type) == ("Qwen3DloLayerForCausalLM", "qwen3_dlo")
    assert isinstance(model, LlamaDloForCausalLM)
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        skipping = model(ids, use_cache=False).logits
        model.masked = True
        torch.testing.assert_close(skipping, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        tokens = model.generate(ids[:, :8], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 12)


@pytest.mark.parametrize("routing", [kind for kind in get_args(RoutingKind) if leaves_keys(kind)])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens_with_a_static_cache_when_the_family_is_routed(
    tmp_path: Path, family: str, routing: RoutingKind
) -> None:
    save_tiny_family(tmp_path / "model", family)
    route_tiny_family(tmp_path / "model", routing)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids, mask = torch.from_numpy(IDS)[:, :8], torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0  # padded at the left
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    grown = model.generate(ids, **options)
    assert model.generate(ids, cache_implementation="static", **options).tolist() == grown.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_injected_layers_pass_everything_on_when_the_family_differs_from_llama(tmp_path: Path, family: str) -> None:
    reference = save_tiny_family(tmp_path / "model", family)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        plan = placements("tli", LAYERS, every=2, init="zero_out")
        adapter = expansion_adapter(checkpoint.tensors, plan, zero_routers=True)
        rng = np.random.default_rng(2)
        routers = {
            name: ArrayTensor(rng.standard_normal(tensor.shape).astype(np.float32))
            for name, tensor in adapter.tensors.items()
            if parse_router(name) is not None and parse_router(name) in (2, 5)
        }
        # Routers for the new layers alone: whoever skips them misses nothing.
        kept = {name: tensor for name, tensor in adapter.tensors.items() if parse_router(name) is None}
        is_dlo = tuple(layer in (2, 5) for layer in range(6))
        save_adapter(dataclasses.replace(adapter, is_dlo=is_dlo, tensors=kept | routers), tmp_path / "adapter")
    result = exported(tmp_path / "model", adapter=tmp_path / "adapter")
    assert result.description.parity.verdict == "PASS"
    assert [layer.index for layer in result.description.layers if layer.injected and layer.identity] == [2, 5]
    assert result.description.source.model_type == family
    own = json.loads((result.folder / "config.json").read_text())
    assert own["dlo_model_type"] == f"{family}_dlo_exattn"
    if family == "smollm3":  # a new layer is rotated, or not, as the layer it was made from
        assert own["no_rope_layers"] == [1, 0, 0, 1, 0, 0]
    positions = np.tile(np.arange(CUTS[-1]), (2, 1))
    found = BareSession(result.folder / "model.onnx").logits_of(IDS, np.ones_like(IDS), positions, CUTS)
    np.testing.assert_allclose(found, stepwise_logits(reference), rtol=1e-5, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize(("family", "rope"), ROUTED_AND_DEEPENED)
def test_artefact_equals_pytorch_beyond_the_original_context_when_routed_and_deepened(
    tmp_path: Path, family: str, rope: str
) -> None:
    routing, lowering = ROUTED_AND_DEEPENED[family, rope]
    save_tiny_family(tmp_path / "model", family, **ROPES[rope], head_dim=8)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        adapter = expansion_adapter(
            checkpoint.tensors, placements("tli", LAYERS, every=2, init="slerp"), zero_routers=True, routing=routing
        )
        rng = np.random.default_rng(4)
        routers = {
            name: ArrayTensor(rng.standard_normal(tensor.shape).astype(np.float32))
            for name, tensor in adapter.tensors.items()
            if parse_router(name) is not None
        }
        save_adapter(dataclasses.replace(adapter, tensors={**adapter.tensors, **routers}), tmp_path / "adapter")
    result = exported(tmp_path / "model", adapter=tmp_path / "adapter", lowering=lowering, parity=False)
    source = open_source(str(tmp_path / "model"), tmp_path / "adapter")
    model, session = (
        llama_dlo_from_tensors(source.config_json(), source.tensors()),
        BareSession(result.folder / "model.onnx"),
    )
    for mask, cuts in ((WHOLE, CUTS), (LEFT_PADDED, CUTS_AT_BORDER)):
        found = session.logits_of(IDS, mask, positions_of(mask), cuts)
        # By parity's table, not by a bound of its own for each logit: PyTorch and ONNX Runtime are each up to 9e-5 off
        # float64 here, single tokens more than others. A step on the wrong side of the border moves logits by 7.
        compared = logit_statistics(stepwise_logits(model, mask, cuts), found, mask.astype(bool))
        assert compared.within(TOLERANCES["fp32"]), compared


def test_calibrated_model_has_its_familys_own_type_when_it_was_plain(tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "qwen3")
    (tmp_path / "text.txt").write_text("What a family adds to a Llama stays with it when it is routed. " * 40)
    sizes = ("--tokens", 512, "--evaluation-tokens", 512, "--target", 0.8)
    made = dlo("calibrate", tmp_path / "model", "-o", tmp_path / "routed", "--text", tmp_path / "text.txt", *sizes)
    assert made.returncode == 0, made.stderr
    config = json.loads((tmp_path / "routed" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_dlo_exattn", ["Qwen3DloForCausalLM"])
    assert exported(tmp_path / "routed").description.parity.verdict == "PASS"


@torch.no_grad()
@pytest.mark.parametrize("routing", get_args(RoutingKind))
@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_the_models_own_stream_when_the_family_differs_from_llama(
    tmp_path: Path, family: str, routing: RoutingKind
) -> None:
    save_tiny_family(tmp_path / "model", family)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        model = llama_dlo_from_tensors(checkpoint.config.model_values(), checkpoint.tensors)
    ids = torch.from_numpy(IDS)
    streams = model.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    stream = LayerStream(model, ids, routing)
    for layer in range(LAYERS):
        torch.testing.assert_close(stream.hidden_states, streams[layer], rtol=1e-5, atol=1e-5)
        # Everybody active, by way of what computes for those who are.
        active = None if leaves_keys(routing) else torch.ones(ids.numel(), dtype=torch.bool)
        stream.advance(layer, stream.run_layer(layer), active)
    torch.testing.assert_close(model.model.norm(stream.hidden_states), streams[-1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["mlp", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_computes_what_inference_does_when_the_same_tokens_are_selected(
    tmp_path: Path, family: str, routing: RoutingKind
) -> None:
    save_tiny_family(tmp_path / "model", family)
    route_tiny_family(tmp_path / "model", routing)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.from_numpy(IDS)
    # Layer routing trains on what all tokens would get, so that only all of them see the same as at inference.
    share = 0.5 if routing == "mlp" else 1.0
    chosen = {
        layer: torch.rand(ids.shape, generator=torch.Generator().manual_seed(layer)) < share for layer in (0, 2, 3)
    }
    select = {layer: (lambda scores, active=active: active) for layer, active in chosen.items()}
    trained = model(ids, use_cache=False, select_tokens=select).logits
    torch.testing.assert_close(trained, model(ids, use_cache=False, force_active=chosen).logits, rtol=1e-5, atol=1e-5)


def test_lora_training_is_refused_when_the_family_multiplies_branches(tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "granite")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        model = llama_dlo_from_tensors(checkpoint.config.model_values(), checkpoint.tensors)
    with pytest.raises(TrainingError, match="mode lora does not know the factors of a granite model's branches"):
        choose_parameters(model, TrainingSettings(mode="lora"))
