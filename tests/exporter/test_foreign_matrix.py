"""The table of docs/passes.md: what of somebody's graph each kind of routing and each lowering takes."""

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.graph_passes.errors import GraphPassError
from tests.foreign_graphs import save_foreign_graph
from tests.foreign_protos import leave_later_tokens_to_attention
from tests.genai_graphs import save_genai_graph

ROOT = Path(__file__).parents[2]


def _spelled_out(folder):
    return ROOT / "tests" / "data" / "optimum_llama" / "model.onnx"


def _causal_by_itself(folder):
    path = save_foreign_graph(folder, "fp32")
    proto = onnx.load(path, load_external_data=False)
    leave_later_tokens_to_attention(proto)
    onnx.save(proto, path)
    return path


# What stands in the table's first column.
GRAPHS = {
    "spelled out": _spelled_out,
    "GroupQueryAttention": lambda folder: save_genai_graph(folder, "fp32"),
    "GroupQueryAttention, weights behind DequantizeLinear": lambda folder: save_genai_graph(
        folder, "int4, DequantizeLinear"
    ),
    "Attention, causal by `is_causal`": _causal_by_itself,
    "Attention, one additive mask": lambda folder: save_foreign_graph(folder, "fp32"),
}


def table():
    """By graph and lowering, a cell per kind of routing."""
    lines = (ROOT / "docs" / "passes.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    first = next(index for index, row in enumerate(rows) if row[0] == "attention in the graph")
    kinds = [kind.strip("`") for kind in rows[first][3:]]
    return {(row[0], row[2].strip("`")): dict(zip(kinds, row[3:], strict=True)) for row in rows[first + 1 :]}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """A graph with a router on every layer."""
    path = functools.cache(lambda name: GRAPHS[name](tmp_path_factory.mktemp("matrix") / "graph"))

    def opened(name, kind):
        graph, folder = path(name), tmp_path_factory.mktemp("routers") / "adapter"
        hidden = 32 if "GroupQuery" not in name else 64
        routers = {f"model.routers.{layer}.weight": ArrayTensor(np.ones((1, hidden), np.float32)) for layer in range(3)}
        save_adapter(DloAdapter(kind, (True,) * 3, tensors=routers), folder)
        return open_source(graph, folder)

    return opened


def test_table_has_every_graph_lowering_and_kind():
    assert set(table()) == {(graph, lowering) for graph in GRAPHS for lowering in ("masked", "compact", "if")}
    assert all(set(row) == {"mlp", "layer", "attention", "attention-active"} for row in table().values())


@pytest.mark.parametrize("graph", GRAPHS)
def test_routing_of_a_graph_is_taken_or_refused_as_the_table_says(source_of, graph):
    cells = [
        (lowering, kind, said)
        for (name, lowering), row in table().items()
        if name == graph
        for kind, said in row.items()
    ]
    refused = set()  # what no lowering takes, whichever it is, is asked for once
    for lowering, kind, said in cells:
        if (kind, said) in refused:
            continue
        if said == "yes":
            build_model(source_of(graph, kind), lowering)  # every stage is checked at its border
            continue
        with pytest.raises(GraphPassError) as refusal:
            build_model(source_of(graph, kind), lowering)
        assert said in refusal.value.message, (lowering, kind)
        assert refusal.value.hint
        refused.add((kind, said))
