"""Graphs that compute the head for each sequence's last token only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.exporter.artefact_description import complete_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.bare_session import BareSession
from tests.exporter.forked_commands import run
from tests.exporter.forked_commands import run as dlo
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

MODELS = {
    "plain": {"tie": True},
    "routed MLPs": {"routed": [True, False, True]},
    "routed layers": {"routed": [True, False, True], "model_type": "llama_dlo"},
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    folder = tmp_path_factory.mktemp("last_logits")
    model = save_tiny_llama(folder / "model", vocab=BYTE_VOCABULARY, tokenizer=True, **MODELS[request.param])
    return export_model(ExportRequest(str(model), folder / "artefact", last_logits=True), Reporter())


def test_artefact_equals_pytorch_and_says_so_when_only_last_logits_are_computed(exported: ExportResult) -> None:
    assert exported.description.parity.verdict == "PASS"
    logits = next(spec for spec in exported.description.interface.outputs if spec.name == "logits")
    assert logits.shape == ("batch_size", 1, BYTE_VOCABULARY)
    # What parity compared is what the graph gives out: one token of each step.
    session = BareSession(exported.folder / "model.onnx")
    session.reset(2)
    ids = np.array([[5, 9, 200], [0, 77, 3]])
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    assert session.step(ids, mask, [[0, 1, 2], [0, 0, 1]])["logits"].shape == (2, 1, BYTE_VOCABULARY)


def test_logits_are_each_sequences_own_when_a_batch_is_padded_at_the_right(exported: ExportResult) -> None:
    """As onnxruntime-genai pads."""
    session = BareSession(exported.folder / "model.onnx")
    prompts = [[5, 9, 200, 31], [77, 3]]
    alone = []
    for prompt in prompts:
        session.reset(1)
        for ids, total in ((prompt, len(prompt)), ([8], len(prompt) + 1)):
            step = session.step([ids], np.ones((1, total), np.int64), [range(total - len(ids), total)])
            alone.append(step["logits"][0])
    session.reset(2)
    together = session.step([prompts[0], [*prompts[1], 0, 0]], [[1] * 4, [1, 1, 0, 0]], [[0, 1, 2, 3], [0, 1, 0, 0]])
    after = session.step([[8], [8]], [[1] * 5, [1, 1, 0, 0, 1]], [[4], [2]])
    for row in range(2):
        for found, wanted in zip((together, after), alone[2 * row : 2 * row + 2], strict=True):
            np.testing.assert_allclose(found["logits"][row], wanted, atol=1e-5)


def test_greedy_tokens_are_pytorchs_when_only_last_logits_are_computed(exported: ExportResult) -> None:
    prompts = [[5, 9, 200, 31, 7], [77, 3]]
    model = exported.folder.with_name("model")
    with open_artefact(exported.folder) as runner, TorchRunner.from_folder(model, masked=True) as reference:
        found = generate(runner, prompts, max_new_tokens=8, prefill_tokens=3)
        wanted = generate(reference, prompts, max_new_tokens=8)
    assert found.sequences == wanted.sequences
    assert found.stats.active_rate == wanted.stats.active_rate


def test_scoring_is_refused_with_the_option_to_leave_out_when_only_last_logits_are_computed(
    exported: ExportResult,
) -> None:
    ids = np.array([[5, 9, 200]])
    with open_artefact(exported.folder) as runner:
        runner.reset(1)
        with pytest.raises(StepError, match="export without --last-logits"):
            runner.step(ids, np.ones_like(ids), np.arange(3)[np.newaxis])


def test_bench_times_an_artefact_and_tells_active_rates_when_only_last_logits_are_computed(
    exported: ExportResult, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Some words of a text that is long enough. " * 400)
    few = ("--rounds", "1", "--prompt-tokens", "8", "--decode-tokens", "2", "--text", tmp_path / "text.txt")
    whole = export_model(
        ExportRequest(str(exported.folder.with_name("model")), tmp_path / "whole", parity=False), Reporter()
    )
    both = run("bench", exported.folder, whole.folder, *few, "--json")
    assert both.returncode == 0, both.stderr
    found, wanted = (artefact["active_rate"] for artefact in json.loads(both.stdout)["artefacts"])
    assert found == wanted
    scored = run("bench", exported.folder, *few, "--perplexity", "512")
    assert (scored.returncode, "leave --perplexity out" in scored.stderr) == (2, True), scored.stderr


@pytest.mark.parametrize("measured", ["--text", "--tasks"])
def test_evaluation_is_refused_with_the_command_to_give_when_only_last_logits_are_computed(
    exported: ExportResult, tmp_path: Path, measured: str
) -> None:
    (tmp_path / "text.txt").write_text("Some words of a text.")
    request = {"context": "One and", "continuation": " two", "label": 0}
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({**request, "doc_id": i}) + "\n" for i in range(2)))
    given = {"--text": tmp_path / "text.txt", "--tasks": tmp_path / "tasks.jsonl"}[measured]
    refused = run("evaluate", exported.folder, measured, given)
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    said = " ".join(refused.stderr.split())
    assert f"{exported.folder}: gives the logits of each sequence's last token alone" in said
    assert "hint: export the model again without --last-logits, or give the checkpoint" in said
    assert "ask for" not in said  # what the library tells its own user


def test_parity_fails_when_the_graph_keeps_the_first_token_in_place_of_the_last(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY)
    result = dlo("export", model, "-o", tmp_path / "out", "--last-logits")
    assert (result.returncode, "parity PASS" in result.stdout) == (0, True), result.stderr
    assert dlo("parity", tmp_path / "out", model).returncode == 0
    graph = ir.load(tmp_path / "out" / "model.onnx")
    (last,) = (node for node in graph.graph if node.op_type == "TopK")
    last.attributes["largest"] = ir.AttrInt64("largest", 0)
    ir.save(graph, tmp_path / "out" / "model.onnx")
    complete_description(load_description(tmp_path / "out"), tmp_path / "out")
    compared = dlo("parity", tmp_path / "out", model)
    assert (compared.returncode, "FAIL" in compared.stdout) == (1, True), compared.stdout
