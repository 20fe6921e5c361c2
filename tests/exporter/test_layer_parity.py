"""Parity a layer at a time: the same verdict as of the whole, the wrong layer by its name, one layer in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.layer_parity import check_parity_by_layer
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.runtimes.parity.layer_report import LayerReport
from tests.exporter.forked_commands import run as dlo
from tests.exporter.test_weightless import routing_adapter
from tests.tiny_families import save_tiny_family
from tests.tiny_models import save_tiny_llama

ROUTED = (True, False, True)
KINDS = {
    "dense": {},
    "tied, 16-bit source": {"tie": True, "dtype": "bfloat16", "rope": "llama3"},
    "mlp": {"routed": ROUTED, "thresholds": {2: 0.375}},
    "layer": {"routed": ROUTED, "model_type": "llama_dlo"},
    "attention": {"routed": ROUTED, "model_type": "llama_dlo_attn"},
}


def exported(model: Path, output: Path, **options: object) -> Path:
    export_model(ExportRequest(str(model), output, parity=False, **options), Reporter())  # type: ignore[arg-type]
    return output


def compared(model: Path, artefact: Path, adapter: Path | None = None) -> LayerReport:
    source = open_source(str(model), adapter, force_base=True)
    return check_parity_by_layer(source, artefact, open_description(artefact))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_passes_when_the_artefact_is_right(tmp_path: Path, kind: str) -> None:
    model = save_tiny_llama(tmp_path / "model", **KINDS[kind])
    report = compared(model, exported(model, tmp_path / "out"))
    assert report.verdict == "PASS", report.summary()
    assert [part.name for part in report.parts] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    assert all(0 <= part.alone < 1e-5 for part in report.parts)
    assert max(part.error for part in report.parts) > 0, "two programs never round alike everywhere"
    routed = [bool(part.decisions) for part in report.parts]
    assert routed == [False, *(ROUTED if "routed" in KINDS[kind] else (False,) * 3), False]


@pytest.mark.parametrize("family", ["qwen3", "smollm3", "granite"])
def test_every_part_passes_when_the_family_is_another(tmp_path: Path, family: str) -> None:
    model = tmp_path / "model"
    save_tiny_family(model, family)
    report = compared(model, exported(model, tmp_path / "out", last_logits=True))
    assert report.verdict == "PASS", report.summary()


def test_deepened_model_is_compared_under_its_adapter_when_it_has_one(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    adapter = routing_adapter(model, tmp_path / "adapter")
    artefact = exported(model, tmp_path / "out", adapter=adapter, force_base=True, lowering="if")
    report = compared(model, artefact, adapter)
    assert report.verdict == "PASS", report.summary()
    assert [part.name for part in report.parts if part.decisions] == ["layer 2", "layer 3"]


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.self_attn.k_proj.weight", "layer 1"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2"),
        ("model.norm.weight", "head"),
        ("lm_head.weight", "head"),
    ],
)
def test_the_part_that_is_wrong_is_named_and_no_other_adds_anything(tmp_path: Path, tensor: str, part: str) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=ROUTED)
    artefact = exported(model, tmp_path / "out")
    weights = load_file(model / "model.safetensors")
    weights[tensor] = weights[tensor] * 1.01
    save_file(weights, model / "model.safetensors")
    report = compared(model, artefact)
    assert (report.verdict, report.first_failing) == ("FAIL", part)
    assert f"the first part beyond its tolerance: {part}" in report.summary()
    assert {each.name for each in report.parts if not each.alone < 1e-5} == {part}


def test_decisions_are_compared_when_a_router_is_another(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=ROUTED)
    artefact = exported(model, tmp_path / "out")
    weights = load_file(model / "model.safetensors")
    weights["model.routers.2.weight"] = -weights["model.routers.2.weight"]
    save_file(weights, model / "model.safetensors")
    report = compared(model, artefact)
    assert (report.verdict, report.first_failing) == ("FAIL", "layer 2")
    flipped = {part.name: len(part.flips) for part in report.parts}
    assert flipped.pop("layer 2") > 50
    assert not any(flipped.values())


def test_command_prints_a_line_per_part_and_fails_with_1(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=ROUTED)
    artefact = exported(model, tmp_path / "out")
    result = dlo("parity", artefact, model, "--by-layer")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "parity PASS  compact against PyTorch, a layer at a time, fp32"
    assert [line.split()[:2] for line in lines[2:]] == [
        ["PASS", "embedding"],
        *[["PASS", "layer"]] * 3,
        ["PASS", "head"],
    ]
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"] *= 2
    save_file(weights, model / "model.safetensors")
    result = dlo("parity", artefact, model, "--by-layer", "--json")
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["first_failing"] == "layer 1"


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", hidden=64, head_dim=16)
    in_place = exported(model, tmp_path / "in-place", static_cache=32)
    with pytest.raises(InputError, match="its cache is written in place"):
        compared(model, in_place)
    deeper = save_tiny_llama(tmp_path / "deeper", hidden=64, head_dim=16, layers=4)
    with pytest.raises(InputError, match="has 3 layers, its source 4"):
        compared(deeper, exported(model, tmp_path / "out"))
    sixteen = exported(model, tmp_path / "bf16", dtype="bf16")
    report = compared(model, sixteen)
    assert (report.verdict, report.to_json()["verdict"]) == ("NOT RUN", "NOT RUN")
    assert "bfloat16" in report.summary()


def test_numbers_that_are_none_fail_and_end_the_comparison(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    artefact = exported(model, tmp_path / "out")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, model / "model.safetensors")
    source = open_source(str(model), None, allow_nonfinite=True)
    report = check_parity_by_layer(source, artefact, open_description(artefact))
    assert (report.verdict, report.first_failing, len(report.parts)) == ("FAIL", "layer 0", 2)
    assert report.to_json()["parts"][1]["error"] is None
