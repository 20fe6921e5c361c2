"""Graphs of other exporters' newest releases: deepened and routed in place, and compared with PyTorch."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.peers import is_installed, peer_environment, requirements_of
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.foreign_graphs import save_routed_adapter
from tests.interop.environments import EXPORTER
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.interop

# What makes a graph: an environment, and arguments of a program in it, the checkpoint and the graph's folder last.
SCRIPT = Path(__file__).parent / "exporters" / "dynamo.py"
EXPORTERS = {
    **{f"mobius {provider}": ("mobius", provider) for provider in ("default", "cpu", "cuda", "trt-rtx")},
    **{f"torch {attention}": ("python", attention) for attention in ("sdpa", "eager")},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("exporters") / "checkpoint", hidden=64, intermediate=96)


def exported_graph(checkpoint: Path, folder: Path, program: str, form: str) -> Path:
    """The graph a program makes of a checkpoint, with the checkpoint's config.json beside it."""
    if not is_installed(EXPORTER, requirements_of(EXPORTER)):
        pytest.skip(f"{EXPORTER} is not installed: make test-interop")
    folder.mkdir()
    graph = folder / "model.onnx"
    arguments = {
        "mobius": ["build", "--config", checkpoint, "--ep", form, folder],
        # PyTorch, transformers and onnxscript are in that environment too.
        "python": ["-P", SCRIPT, checkpoint, graph, form],
    }
    command = [peer_environment(EXPORTER) / program, *arguments[program]]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env={"PATH": "/usr/bin"})
    assert made.returncode == 0, made.stderr[-4000:]
    shutil.copy(checkpoint / "config.json", folder)
    return graph


@pytest.mark.parametrize(("program", "form"), EXPORTERS.values(), ids=EXPORTERS)
def test_graph_equals_pytorch_when_it_is_deepened_and_routed(checkpoint, program, form, tmp_path):
    graph = exported_graph(checkpoint, tmp_path / "graph", program, form)
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    for lowering in ("compact", "if"):
        request = ExportRequest(str(graph), tmp_path / lowering, adapter=adapter, lowering=lowering)
        result = export_model(request, Reporter())
        assert result.description.parity.verdict == "PASS", result.parity_summary
        assert "against PyTorch" in result.parity_summary
