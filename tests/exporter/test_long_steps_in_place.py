"""Long steps of compaction on a cache in place: active queries and the slots they see, against a growing cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dlo_export.checkpoints.model_types import RoutingKind, leaves_keys
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.graph_passes.cache.attend_active_slots import AttendActiveSlotsPass
from dlo_export.graph_passes.cleanup.long_steps import LEAST
from dlo_export.runtimes.artefact.description import MODEL_NAME
from tests.bare_session import BareSession, InPlaceSession
from tests.graph_passes.test_skipping_profile import profiled_shapes
from tests.tiny_families import ROPES, route_tiny_family, save_tiny_family
from tests.tiny_models import save_tiny_llama

SLOTS = 4 * LEAST
IDS = np.random.default_rng(3).integers(3, 97, (1, 2 * LEAST + 30))
CUTS = (LEAST + 9, LEAST + 10, LEAST + 15, 2 * LEAST + 20, 2 * LEAST + 21, 2 * LEAST + 30)
KINDS: dict[RoutingKind, dict[str, str]] = {
    "layer": {"model_type": "llama_dlo"},
    "attention": {"model_type": "llama_dlo_attn"},
    "attention-active": {"model_type": "llama_dlo_attn", "routing_kv": "active"},
}


def exported(model: Path, output: Path, **options: object) -> Path:
    request = ExportRequest(str(model), output, lowering="compact", parity=False, **options)  # type: ignore[arg-type]
    return export_model(request, Reporter()).folder


def check_slot_for_slot(static: Path, growing: Path, tolerance: float) -> int:
    """Compares logits and every slot; returns how many keys are zeros. Slots that nobody has written hold sevens."""
    bare, in_place = BareSession(growing / MODEL_NAME), InPlaceSession(static / MODEL_NAME, fill=7.0)
    mask, positions = np.ones_like(IDS), np.arange(IDS.shape[1])[np.newaxis]
    wanted = bare.logits_of(IDS, mask, positions, CUTS)
    np.testing.assert_allclose(in_place.logits_of(IDS, CUTS), wanted, rtol=0, atol=tolerance)
    skipped = 0
    for name, expected in bare.state.items():
        found = in_place.slots(name)
        rows = np.moveaxis(found, 2, 0)
        assert (rows[IDS.shape[1] :] == 7.0).all(), name
        if expected.ndim == 2:
            np.testing.assert_array_equal(found[:, 0, : IDS.shape[1], 0], expected, err_msg=name)
            continue
        np.testing.assert_allclose(found[:, :, : IDS.shape[1]], expected, rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_array_equal(found[:, :, : IDS.shape[1]] == 0, expected == 0, err_msg=name)
        skipped += np.count_nonzero(expected[0, 0, :, 0] == 0)
    return skipped


@pytest.mark.parametrize("head_dim", [16, 8], ids=["operator-rotates", "graph-rotates"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_steps_write_what_a_growing_cache_holds(kind: RoutingKind, head_dim: int, tmp_path: Path) -> None:
    sizes = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": head_dim}
    save_tiny_llama(tmp_path / "model", **sizes, **KINDS[kind], routed=(True, False, True), thresholds={2: 0.4})  # type: ignore[arg-type]
    growing = exported(tmp_path / "model", tmp_path / "growing")
    static = exported(tmp_path / "model", tmp_path / "static", static_cache=SLOTS)
    zeros = check_slot_for_slot(static, growing, 2e-5)
    assert bool(zeros) is not leaves_keys(kind)


@pytest.mark.parametrize(
    ("family", "values", "routing", "dtype"),
    [
        ("granite", ROPES["yarn"], "attention-active", "fp32"),
        ("smollm3", {}, "layer", "fp16"),
        ("olmo2", {}, "attention", "fp32"),
        ("qwen2", {}, "layer", "fp32"),
        ("qwen3", ROPES["llama3"], "attention-active", "fp32"),
    ],
    ids=str,
)
def test_long_steps_of_families_write_what_a_growing_cache_holds(
    family: str, values: dict[str, object], routing: RoutingKind, dtype: str, tmp_path: Path
) -> None:
    save_tiny_family(tmp_path / "model", family, **{**values, "head_dim": 16, "max_position_embeddings": SLOTS})
    route_tiny_family(tmp_path / "model", routing)
    growing = exported(tmp_path / "model", tmp_path / "growing", dtype=dtype)
    static = exported(tmp_path / "model", tmp_path / "static", static_cache=SLOTS, dtype=dtype)
    check_slot_for_slot(static, growing, 5e-5 if dtype == "fp32" else 5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_given_active_queries_and_what_they_see(kind: RoutingKind, tmp_path: Path) -> None:
    """Of a long step behind some tokens; a short one, and one that skips nothing, are the operator's as they are."""
    sizes = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "layers": 1}
    save_tiny_llama(tmp_path / "model", **sizes, **KINDS[kind], routed=(True,))  # type: ignore[arg-type]
    model = build_model(open_source(str(tmp_path / "model"), None), "compact", static_cache=SLOTS)
    past, seen_before = 10, 4
    feeds = {
        value.name: np.zeros((1, *value.shape[1:]), np.float32)  # type: ignore[index]  # of four dimensions
        for value in model.graph.inputs
        if (value.name or "").startswith("past_")
    }
    if (state := feeds.get("past_active.0")) is not None:
        state[0, 0, :seen_before] = 1
    routed = decisions(tmp_path / "model")
    active, skipping = (int(np.flatnonzero(routed == decision)[0]) for decision in (True, False))
    path = "model.layers.0.self_attn"
    for sequence, skip in ((LEAST - 1, 50), (LEAST, 0), (LEAST, 50), (LEAST + 40, LEAST)):
        ids = np.full((1, sequence), active)
        ids[0, :skip] = skipping
        kv_lengths = np.array([past + sequence])
        shapes = profiled_shapes(model, {"input_ids": ids, "kv_lengths": kv_lengths, **feeds}, tmp_path)
        chosen = f"{path}.attended_rows.queries.some"
        operators = [name for name in shapes if "group_query_attention" in name or "groupqueryattention" in name]
        if sequence < LEAST or not skip:
            assert len(operators) == 1
            assert not any(name.startswith(chosen) for name in shapes)
            continue
        assert not operators
        assert shapes[f"{chosen}.attention"] == [[1, 4, sequence - skip, 16]]
        seen = past + sequence if state is None else seen_before + sequence - skip
        assert shapes[f"{chosen}.mask"] == [[seen]]
    assert not AttendActiveSlotsPass()(model).modified


def decisions(folder: Path) -> np.ndarray:
    """Who of the vocabulary is active in layer 0, whose stream is the embedding: bool [vocabulary]."""
    weights = load_file(folder / "model.safetensors")
    router = next(weight for name, weight in weights.items() if "router" in name)
    return np.asarray(weights["model.embed_tokens.weight"] @ router.reshape(-1) > 0)
