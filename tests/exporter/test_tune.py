"""`dlo bench --tune`: an artefact lowered again from itself alone, and rewritten whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter import pipeline
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.relowering import ReloweredGraph
from dlo_export.exporter.tune import rewrite_lowering, tunable
from dlo_export.graph_passes.routing.decide_by_logits import DecideByLogitsPass
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass, multiplies_columns
from dlo_export.graph_passes.spec.provenance import role_values
from tests.bare_session import BareSession, InPlaceSession
from tests.exporter.forked_commands import run
from tests.tiny_models import save_byte_tokenizer, save_tiny_llama

ROUTED = (True, False, True)
WIDE = {"hidden": 64, "head_dim": 16}  # what attention on a cache in place takes
TYPES = {"mlp": "llama_dlo_exattn", "layer": "llama_dlo", "attention": "llama_dlo_attn"}
IDS = np.random.default_rng(0).integers(0, 97, (2, 7))


def exported(folder: Path, **options: object) -> Path:
    """An artefact of the model beside it."""
    export_model(ExportRequest(str(folder / "model"), folder / "out", parity=False, **options), Reporter())  # type: ignore[arg-type]
    return folder / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(artefact: Path, slots: int | None) -> np.ndarray:
    if slots is not None:  # a step of several tokens is one of a single sequence
        return InPlaceSession(artefact / "model.onnx").logits_of(IDS[:1], (4, 5, 7))
    positions = np.tile(np.arange(IDS.shape[1]), (2, 1))
    return BareSession(artefact / "model.onnx").logits_of(IDS, np.ones_like(IDS), positions, (4, 7))


@pytest.mark.parametrize("slots", [None, 24], ids=["growing", "in-place"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("before", "after"), [("if", "compact"), ("masked", "if")])
def test_artefact_is_the_export_in_the_other_lowering_when_it_is_rewritten(
    tmp_path, kind, before, after, slots
) -> None:
    rescale = kind == "mlp"  # others have routers whose scores nothing but the decision reads
    save_tiny_llama(tmp_path / "model", **WIDE, layers=3, routed=ROUTED, model_type=TYPES[kind], rescale=rescale)
    artefact = exported(tmp_path, lowering=before, last_logits=kind == "mlp", static_cache=slots)
    description, own, expected = open_description(artefact), contents(artefact), logits(artefact, slots)
    model = ReloweredGraph(artefact, description).lowered(after)
    rewrite_lowering(artefact, description, model, after, "a reason", 0.0)
    np.testing.assert_allclose(logits(artefact, slots), expected, rtol=1e-5, atol=1e-5)
    found = open_description(artefact)  # hashes and contradictions
    assert (found.lowering, found.lowering_reason, found.parity.verdict) == (after, "a reason", "NOT RUN")
    assert f"from {before} (parity NOT RUN) to {after}" in (found.parity.reason or "")
    changed = {name for name, content in contents(artefact).items() if own.get(name) != content}
    assert changed == {"model.onnx", "dlo_artifact.json", "dlo_files.json"}
    # What an export with that lowering gives, weights included.
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "model", tmp_path / "other" / "model")
    other = exported(tmp_path / "other", lowering=after, last_logits=kind == "mlp", static_cache=slots)
    assert contents(other)["model.onnx"] == contents(artefact)["model.onnx"]
    assert (artefact / "model.onnx.data").stat().st_nlink == 1  # onnx refuses data files of several names


def test_injected_layers_are_lowered_again_when_an_adapter_brought_them(tmp_path) -> None:
    save_tiny_llama(tmp_path / "model", layers=2)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        plan = placements("tli", 2, every=1, init="zero_out")
        save_adapter(expansion_adapter(checkpoint.tensors, plan, zero_routers=True), tmp_path / "adapter")
    artefact = exported(tmp_path, lowering="if", adapter=tmp_path / "adapter")
    graph = ReloweredGraph(artefact, open_description(artefact)).lowered("compact").graph
    assert sum(node.op_type == "NonZero" for node in graph.all_nodes()) == 4


def test_head_and_routers_stay_as_an_older_export_wrote_them_when_it_is_lowered_again(tmp_path, monkeypatch) -> None:
    save_tiny_llama(tmp_path / "model", layers=3, routed=ROUTED, tie=True, rescale=False)
    with monkeypatch.context() as older:
        older.setattr(pipeline, "_head_steps", lambda stage, target: [])
        for unknown in (DecideByLogitsPass, MultiplyRouterRowsPass):
            older.setattr(unknown, "rewrite", lambda self, model: False)
        artefact = exported(tmp_path, lowering="if")
    graph = ReloweredGraph(artefact, open_description(artefact)).lowered("compact").graph
    assert "Gemm" in {node.op_type for node in graph}
    assert role_values(graph, "router_scores")
    assert multiplies_columns(graph)
    with monkeypatch.context() as older:
        older.setattr(MultiplyRouterRowsPass, "rewrite", lambda self, model: False)
        artefact = exported(tmp_path, lowering="if", force=True)
    graph = ReloweredGraph(artefact, open_description(artefact)).lowered("compact").graph
    assert not role_values(graph, "router_scores")
    assert multiplies_columns(graph)
    newer = exported(tmp_path, lowering="if", force=True)
    graph = ReloweredGraph(newer, open_description(newer)).lowered("compact").graph
    assert "Gemm" not in {node.op_type for node in graph}
    assert not role_values(graph, "router_scores")
    assert not multiplies_columns(graph)


def test_graph_is_refused_when_it_is_not_what_config_json_says(tmp_path) -> None:
    save_tiny_llama(tmp_path / "model", layers=3, routed=ROUTED)
    artefact = exported(tmp_path)
    config = json.loads((artefact / "config.json").read_text())
    (artefact / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    with pytest.raises(
        InputError, match=r"cannot be lowered again: built from config\.json, it has other nodes"
    ) as err:
        ReloweredGraph(artefact, open_description(artefact))
    assert "export the model once with each --lowering" in str(err.value)


def test_genai_config_names_the_operators_library_when_the_new_lowering_has_them(tmp_path) -> None:
    save_tiny_llama(tmp_path / "model", layers=3, routed=ROUTED)
    artefact = exported(tmp_path, lowering="compact")
    for lowering, named in (("plugin", True), ("compact", False)):
        description = open_description(artefact)
        model = ReloweredGraph(artefact, description).lowered(lowering)
        rewrite_lowering(artefact, description, model, lowering, "a reason", 0.0)
        assert open_description(artefact).lowering == lowering
        assert ("libdlo_ort.so" in (artefact / "genai_config.json").read_text()) is named


@pytest.mark.parametrize(("kind", "slots"), [("mlp", None), ("mlp", 10), ("layer", 10)])
def test_bench_tunes_an_artefact_when_its_lowerings_are_measured(tmp_path, kind, slots) -> None:
    save_tiny_llama(tmp_path / "model", **WIDE, layers=3, routed=ROUTED, vocab=300, model_type=TYPES[kind])
    save_byte_tokenizer(tmp_path / "model", 300)
    artefact = exported(tmp_path, lowering="masked", static_cache=slots)
    (tmp_path / "text.txt").write_text("Some words of a text that is long enough. " * 400)
    few = ("--rounds", "2", "--prompt-tokens", "8", "--decode-tokens", "2", "--text", tmp_path / "text.txt")
    ended = run("bench", "--tune", artefact, *few, "--json", "--batch", "2")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert [row["lowering"] for row in report["lowerings"]] == ["masked", "if", "compact"]
    assert all(row["logits_difference"] < 1e-5 for row in report["lowerings"])
    assert (report["before"], report["after"]) == ("masked", open_description(artefact).lowering)


def test_artefact_is_tuned_where_a_link_leads_when_a_link_is_given(tmp_path) -> None:
    save_tiny_llama(tmp_path / "model", layers=2, routed=(True, True), vocab=300)
    save_byte_tokenizer(tmp_path / "model", 300)
    artefact = exported(tmp_path, lowering="masked")
    (tmp_path / "text.txt").write_text("Some words of a text that is long enough. " * 400)
    (tmp_path / "link").symlink_to("out")
    few = ("--rounds", "1", "--prompt-tokens", "8", "--decode-tokens", "2", "--text", tmp_path / "text.txt")
    ended = run("bench", "--tune", tmp_path / "link", *few, "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["after"] == open_description(artefact).lowering
    assert (tmp_path / "link").is_symlink()
    inside = run("bench", "--tune", ".", *few, working_folder=artefact)
    assert (inside.returncode, "run it from another folder" in inside.stderr) == (2, True), inside.stderr


@pytest.mark.parametrize("replaced", ["weights", "artefact"])
def test_nothing_is_rewritten_when_somebody_else_changed_the_artefact_meanwhile(tmp_path, replaced) -> None:
    save_tiny_llama(tmp_path / "model", layers=3, routed=ROUTED)
    artefact = exported(tmp_path, lowering="masked")
    description = open_description(artefact)
    model = ReloweredGraph(artefact, description).lowered("compact")
    if replaced == "weights":
        weights = artefact / "model.onnx.data"
        content = bytearray(weights.read_bytes())
        content[100] ^= 1
        weights.write_bytes(content)
    else:
        shutil.rmtree(tmp_path / "model")
        save_tiny_llama(tmp_path / "model", layers=3, routed=ROUTED, seed=1)
        exported(tmp_path, lowering="if", force=True)
    own = contents(artefact)
    with pytest.raises(InputError, match="was changed while its lowerings were measured"):
        rewrite_lowering(artefact, description, model, "compact", "a reason", 0.0)
    assert contents(artefact) == own
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ([], "holds a JSON list"),
        ({}, "model is null"),
        ({"model": 3}, "model is 3"),
        ({"model": {"decoder": []}}, r"model\.decoder is \[\]"),
        ({"model": {"decoder": {"session_options": None}}}, r"model\.decoder\.session_options is null"),
    ],
)
def test_genai_config_that_was_edited_is_refused_before_anything_is_measured(tmp_path, settings, field) -> None:
    save_tiny_llama(tmp_path / "model", layers=2, routed=(True, True))
    artefact = exported(tmp_path)
    (artefact / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"out/genai_config\.json: .*{field}"):
        tunable(artefact, None, None)


def test_artefact_stays_as_it_is_when_it_cannot_be_tuned(tmp_path) -> None:
    save_tiny_llama(tmp_path / "model", layers=3, routed=ROUTED)
    artefact = exported(tmp_path)
    own = contents(artefact)
    with pytest.raises(InputError, match="was made for --provider cpu"):
        tunable(artefact, "cuda", None)
    with pytest.raises(InputError, match=r"has no dlo_artifact\.json"):
        tunable(tmp_path / "model", None, None)
    (artefact / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        tunable(artefact, None, None)
    (artefact / "notes.txt").unlink()
    (artefact / "model.onnx").write_bytes(own["model.onnx"] + b" ")
    with pytest.raises(InputError, match=r"model\.onnx: was changed"):
        tunable(artefact, None, None)
    (artefact / "model.onnx").write_bytes(own["model.onnx"])
    assert contents(artefact) == own
    static = exported(tmp_path, static_cache=9, force=True)
    longer = run("bench", "--tune", static, "--prompt-tokens", "8", "--decode-tokens", "2")
    assert (longer.returncode, "its static cache holds 9 tokens" in longer.stderr) == (2, True), longer.stderr
    several = run("bench", "--tune", artefact, artefact)
    assert (several.returncode, "--tune takes one artefact" in several.stderr) == (2, True), several.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "nothing is routed, so it has no lowering"),
        ({"static_cache": 32, "provider": "cuda", "dtype": "fp16", "lowering": "masked"}, "cache for a CUDA graph"),
        ({"lowering": "plugin"}, "ONNX Runtime computes them with libdlo_ort.so alone, and none is given"),
    ],
)
def test_artefact_is_refused_when_there_is_nothing_to_choose(tmp_path, options, reason) -> None:
    save_tiny_llama(tmp_path / "model", **WIDE, layers=2, routed=(True, True) if options else None)
    artefact = exported(tmp_path, **options)
    with pytest.raises(Exception, match=reason) as err:
        tunable(artefact, None, None)
    assert getattr(err.value, "hint", None)
