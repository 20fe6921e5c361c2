"""Graphs of several exporters, to be changed, and adapters that change nothing.

Apart from what compares them, since the processes that compare need none of what makes them.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import onnx

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from tests.foreign_graphs import save_foreign_graph
from tests.foreign_protos import fuse_skip_norms, leave_later_tokens_to_attention
from tests.fuzz.edited_graphs import KINDS
from tests.genai_graphs import save_genai_graph

_OPTIMUM = Path(__file__).parents[1] / "data" / "optimum_llama"


def save_sources(folder: Path) -> None:
    """Writes each graph into a folder of its own, and for each an adapter per kind of routing.

    The adapters change nothing: layers that add nothing, and routers that let every token through.
    """
    folder.mkdir()
    for name, change in (("plain", None), ("fused", fuse_skip_norms), ("causal", leave_later_tokens_to_attention)):
        graph = save_foreign_graph(folder / name, "fp32", layers=2)
        shutil.rmtree(folder / name / "checkpoint")
        if change is not None:
            model = onnx.load(graph, load_external_data=False)
            change(model)
            onnx.save(model, graph)
    (folder / "optimum").mkdir()
    for name in ("model.onnx", "config.json"):
        shutil.copy(_OPTIMUM / name, folder / "optimum")
    forms = {"packed": "fp32", "int4": "int4, zero points", "int4-dequantised": "int4, DequantizeLinear"}
    for name, form in forms.items():
        graph = save_genai_graph(folder / f"{name}.genai", form, layers=2)
        graph.parent.rename(folder / name)
        shutil.rmtree(folder / f"{name}.genai")
    for source in sorted(path for path in folder.iterdir()):
        graph = open_foreign_graph(source / "model.onnx")
        plan = placements("tli", graph.num_layers, every=1)
        for kind in KINDS:
            adapter = expansion_adapter(graph.tensors, plan, zero_routers=True, routing=kind)
            open_to_all = dict.fromkeys(range(plan.num_layers), 0.25)  # a router of zeros scores one half
            adapter = dataclasses.replace(adapter, rescale_hidden_states=False, router_thresholds=open_to_all)
            save_adapter(adapter, folder / "adapters" / source.name / kind)
