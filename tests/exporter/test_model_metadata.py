"""model.onnx says by itself what it is."""

import json

import onnx_ir as ir

from dlo_export import __version__
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.tiny_models import save_tiny_llama


def test_graph_says_what_it_is_when_exported(tmp_path):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    export_model(ExportRequest(str(model), tmp_path / "out", parity=False, lowering="if"), Reporter())
    graph = ir.load(tmp_path / "out" / "model.onnx")
    assert (graph.producer_name, graph.producer_version, graph.graph.name) == ("dlo-export", __version__, "model")
    said = graph.metadata_props
    assert {name: said[name] for name in ("dtype", "lowering", "num_layers", "injected_layers", "routed_layers")} == {
        **{"dtype": "fp32", "lowering": "if", "num_layers": "3", "injected_layers": "", "routed_layers": "0 2"}
    }
    assert "3 layers (0 injected, 2 routed, lowering if), fp32, made from model" in graph.doc_string
    description = json.loads((tmp_path / "out" / "dlo_artifact.json").read_text())
    assert (description["lowering"], description["routing"]["layers"]) == ("if", [0, 2])
