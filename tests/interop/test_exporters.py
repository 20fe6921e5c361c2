"""Graphs of other exporters' newest releases: deepened and routed in place, and compared with PyTorch."""

import contextlib
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.peers import is_installed, peer_program, requirements_of
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from tests.foreign_graphs import save_routed_adapter
from tests.interop.environments import EXPORTER
from tests.tiny_families import save_tiny_family
from tests.tiny_models import ROPES

# Marks, so that nobody makes a checkpoint where it is not there.
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not is_installed(EXPORTER, requirements_of(EXPORTER)),
        reason=f"{EXPORTER} is not installed: make test-interop",
    ),
]

# What makes a graph: an environment, and arguments of a program in it, the checkpoint and the graph's folder last.
SCRIPT = Path(__file__).parent / "exporters" / "dynamo.py"
EXPORTERS = {
    **{f"mobius {provider}": ("mobius", provider) for provider in ("default", "cpu", "cuda", "trt-rtx")},
    **{f"torch {attention}": ("python", attention) for attention in ("sdpa", "eager")},
}
# Those that every family is exported with: each form of attention once.
COMMON = ("mobius default", "mobius cpu", "torch sdpa")


# Families with the same block: a model_type of transformers, and what of its config.json counts here.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, llama3 rope": {"rope_parameters": ROPES["llama3"]},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
}
CASES = [(family, exporter) for family in FAMILIES for exporter in EXPORTERS if family == "llama" or exporter in COMMON]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """The checkpoint of a family, made once."""

    def saved(family):
        folder = tmp_path_factory.mktemp("exporters") / "checkpoint"
        save_tiny_family(folder, family.split(",")[0], **SIZES, **FAMILIES[family])
        return folder

    return functools.cache(saved)


def exported_graph(checkpoint: Path, folder: Path, program: str, form: str) -> Path:
    """The graph a program makes of a checkpoint, with the checkpoint's config.json beside it."""
    folder.mkdir()
    graph = folder / "model.onnx"
    arguments = {
        "mobius": ["build", "--config", checkpoint, "--ep", form, folder],
        # PyTorch, transformers and onnxscript are in that environment too.
        "python": ["-P", SCRIPT, checkpoint, graph, form],
    }
    command = [*peer_program(EXPORTER, program), *arguments[program]]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env={"PATH": "/usr/bin"})
    assert made.returncode == 0, made.stderr[-4000:]
    shutil.copy(checkpoint / "config.json", folder)
    return graph


@pytest.mark.parametrize(("family", "exporter"), CASES)
def test_graph_equals_pytorch_when_it_is_deepened_and_routed(checkpoint_of, family, exporter, tmp_path):
    graph = exported_graph(checkpoint_of(family), tmp_path / "graph", *EXPORTERS[exporter])
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    for lowering in ("compact", "if"):
        request = ExportRequest(str(graph), tmp_path / lowering, adapter=adapter, lowering=lowering)
        result = export_model(request, Reporter())
        assert result.description.parity.verdict == "PASS", result.parity_summary
        assert "against PyTorch" in result.parity_summary
    with contextlib.closing(open_source(graph, adapter)) as source:
        options = TensorRtOptions("compact", max_cache=64, max_sequence=32)
        report = check_parity(source, result.folder, result.description, [options])
    assert report.verdict == "PASS", report.summary()
    assert "trt compact" in report.summary()


@pytest.mark.parametrize("exporter", ["mobius default", "mobius trt-rtx"])
@pytest.mark.parametrize("kind", ["layer", "attention", "attention-active"])
def test_graph_equals_pytorch_when_its_attention_is_skipped(checkpoint_of, exporter, kind, tmp_path):
    graph = exported_graph(checkpoint_of("llama"), tmp_path / "graph", *EXPORTERS[exporter])
    adapter = save_routed_adapter(graph, tmp_path / "adapter", routing=kind)
    for lowering in ("compact", "if"):
        request = ExportRequest(str(graph), tmp_path / lowering, adapter=adapter, lowering=lowering)
        result = export_model(request, Reporter())
        assert result.description.parity.verdict == "PASS", result.parity_summary
