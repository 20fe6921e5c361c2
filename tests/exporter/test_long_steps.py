"""Long steps of compaction on a cache that grows, of padded batches: against PyTorch, and the masked form's cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import DynamicCache

from dlo_export.checkpoints.model_types import RoutingKind, leaves_keys
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.graph_passes.cleanup.long_steps import LEAST
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.runtimes.artefact.description import MODEL_NAME
from dlo_export.runtimes.parity.statistics import logit_statistics
from dlo_export.runtimes.parity.tolerances import TOLERANCES
from tests.bare_session import BareSession, left_padded
from tests.tiny_families import ROPES, route_tiny_family, save_tiny_family

# A long step, tokens alone, a longer step behind them that ends padding, tokens; two sequences are padded.
LENGTHS = (2 * LEAST + 30, LEAST + 70, 40)
CUTS = (LEAST + 9, LEAST + 10, 2 * LEAST + 28, 2 * LEAST + 29, 2 * LEAST + 30)
CACHE = {"fp32": 5e-5, "fp16": 5e-2}
CASES: dict[str, tuple[str, dict[str, object], RoutingKind, str]] = {
    "llama": ("llama", {}, "layer", "fp32"),
    "llama, attention": ("llama", {}, "attention", "fp32"),
    "granite, yarn": ("granite", ROPES["yarn"], "attention-active", "fp32"),
    "smollm3, fp16": ("smollm3", {}, "layer", "fp16"),
    "olmo2": ("olmo2", {}, "attention-active", "fp32"),
    "qwen2": ("qwen2", {}, "layer", "fp32"),
    "qwen3, llama3": ("qwen3", ROPES["llama3"], "layer", "fp32"),
}


@pytest.mark.parametrize("last_logits", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("case", CASES)
def test_long_steps_of_padded_batches_compute_what_pytorch_does(case: str, last_logits: bool, tmp_path: Path) -> None:
    family, values, routing, dtype = CASES[case]
    save_tiny_family(tmp_path / "model", family, **{**values, "head_dim": 16, "max_position_embeddings": 4 * LEAST})
    route_tiny_family(tmp_path / "model", routing)
    sessions = {}
    for lowering in ("masked", "compact"):
        options = {"lowering": lowering, "dtype": dtype, "last_logits": last_logits, "parity": False}
        request = ExportRequest(str(tmp_path / "model"), tmp_path / lowering, **options)  # type: ignore[arg-type]
        sessions[lowering] = BareSession(export_model(request, Reporter()).folder / MODEL_NAME)
    masked, compact = sessions["masked"], sessions["compact"]
    graph = ir.load(tmp_path / "compact" / MODEL_NAME).graph
    chosen = sum(node.op_type == "GatherElements" for node in graph.all_nodes())
    assert chosen == (0 if leaves_keys(routing) else 3), "of keys, in every routed layer"

    rng = np.random.default_rng(3)
    ids, mask, positions = left_padded([rng.integers(3, 259, (1, length)) for length in LENGTHS])
    expected, found = (session.logits_of(ids, mask, positions, CUTS) for session in (masked, compact))
    real = mask.astype(bool)
    columns = np.array(CUTS) - 1 if last_logits else np.arange(CUTS[-1])
    if dtype == "fp32":
        expected = pytorch_logits(tmp_path / "model", ids, mask, positions)[:, columns]
    compared = logit_statistics(expected, found, real[:, columns])
    assert compared.within(TOLERANCES[dtype]), compared
    for name, wanted in masked.state.items():
        rows = np.moveaxis(compact.state[name], 2, 1) if wanted.ndim == 4 else compact.state[name]
        others = np.moveaxis(wanted, 2, 1) if wanted.ndim == 4 else wanted
        np.testing.assert_array_equal(rows[real] == 0, others[real] == 0, err_msg=name)
        np.testing.assert_allclose(rows[real], others[real], rtol=0, atol=CACHE[dtype], err_msg=name)


@torch.no_grad()
def pytorch_logits(folder: Path, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Of the routed model with a cache of its own, fed as the artefact is."""
    source = open_source(str(folder), None)
    model = llama_dlo_from_tensors(source.config_json(), source.tensors())
    tokens, seen, places = (torch.from_numpy(array) for array in (ids, mask, positions))
    cache, pieces = DynamicCache(config=model.config), []
    for start, stop in zip((0, *CUTS[:-1]), CUTS, strict=True):
        step = {"attention_mask": seen[:, :stop], "position_ids": places[:, start:stop], "past_key_values": cache}
        pieces.append(model(tokens[:, start:stop], use_cache=True, **step).logits)
    return torch.cat(pieces, dim=1).numpy()
