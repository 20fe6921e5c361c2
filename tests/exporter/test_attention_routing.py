"""Models of which tokens skip attention alone, from the command line to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.exporter.forked_commands import run
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

KINDS: dict[str, RoutingKind] = {"all": "attention", "active": "attention-active"}


@pytest.fixture(scope="module", params=KINDS)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return save_tiny_llama(
        tmp_path_factory.mktemp(request.param) / "model",
        vocab=BYTE_VOCABULARY,
        tokenizer=True,
        routed=[True, False, True],
        model_type="llama_dlo_attn",
        routing_kv=None if request.param == "all" else request.param,
        thresholds={2: 0.4},
    )


@pytest.fixture(scope="module", params=["auto", "masked", "if"])
def exported(model: Path, request: pytest.FixtureRequest) -> ExportResult:
    output = model.with_name(request.param)
    return export_model(ExportRequest(str(model), output, lowering=request.param), Reporter())


def test_artefact_equals_pytorch_and_says_so_when_attention_is_skipped(exported: ExportResult) -> None:
    description = exported.description
    assert description.parity.verdict == "PASS"
    assert description.routing is not None
    kind = KINDS[exported.folder.parent.name.rstrip("0123456789")]
    assert (description.routing.kind, description.routing.layers) == (kind, (0, 2))
    states = [spec.name for spec in description.interface.inputs if "active" in spec.name]
    assert states == ([] if kind == "attention" else ["past_active.0", "past_active.2"])
    assert (exported.folder / "genai_config.json").exists() == (kind == "attention"), "it can carry a KV cache alone"
    config = json.loads((exported.folder / "config.json").read_text())
    assert (config["model_type"], config.get("dlo_model_type")) == (
        ("llama", "llama_dlo_attn") if kind == "attention" else ("llama_dlo_attn", None)
    )


def test_greedy_tokens_are_pytorchs_when_prompts_are_padded(model: Path, exported: ExportResult) -> None:
    prompts = [[5, 9, 200, 31, 7], [77, 3]]
    with open_artefact(exported.folder) as runner, TorchRunner.from_folder(model, masked=True) as reference:
        found, wanted = (generate(each, prompts, max_new_tokens=12) for each in (runner, reference))
    assert found.sequences == wanted.sequences
    assert found.stats.active_rate == wanted.stats.active_rate
    assert list(found.stats.active_rate) == [0, 2]


@pytest.mark.parametrize("model", ["all"], indirect=True)
@pytest.mark.parametrize("exported", ["auto"], indirect=True)
def test_commands_take_the_artefact_when_attention_is_skipped(exported: ExportResult, tmp_path: Path) -> None:
    inspected = run("inspect", exported.folder)
    saved = "a token that skips a layer saves its part of attention's query and output projections"
    assert saved in " ".join(inspected.stdout.split())
    told = run("run", exported.folder, "abc", "-n", "3")
    assert (told.returncode, "active, original layers:" in told.stderr) == (0, True), told.stderr
    few = ("--prompt-tokens", "8", "--decode-tokens", "2", "--rounds", "1")
    timed = run("bench", exported.folder, *few)
    assert timed.returncode == 0, timed.stderr


@pytest.mark.parametrize("model", ["all"], indirect=True)
@pytest.mark.parametrize(
    ("lowering", "cache", "message"),
    [
        ("if", "static", "--lowering if takes mlp and layer routing: choose compact"),
        ("plugin", "static", "--lowering plugin takes mlp and layer routing: choose compact"),
        ("auto", "growing", "attention routing needs --trt-cache static"),
    ],
)
def test_tensorrt_is_refused_by_name_when_it_cannot_skip_attention(
    model: Path, tmp_path: Path, lowering: str, cache: Literal["static", "growing"], message: str
) -> None:
    trt = TensorRtRequest(backend="rtx", cache=cache)
    with pytest.raises(InputError, match=rf"{message}(.|\n)*hint: "):
        export_model(ExportRequest(str(model), tmp_path / "out", lowering=lowering, trt=trt), Reporter())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("routing", "kept"), [("attention", "all"), ("attention-active", "active")])
def test_expand_makes_routers_of_attention_when_asked(routing: str, kept: str, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    options = ("--every", 1, "--routers", "--routing", routing)
    result = run("expand", model, "-o", tmp_path / "deep", *options)
    assert result.returncode == 0, result.stderr
    assert "every token skips those attentions" in result.stderr
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert (config["model_type"], config["attention_routing_kv"]) == ("llama_dlo_attn", kept)
