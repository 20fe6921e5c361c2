"""Someone else's 16-bit graph: what it is described as, judged by, and lowered to."""

import dataclasses
import json

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.runtimes.artefact.engine_record import ParityVerdict
from dlo_export.runtimes.parity.tolerances import TOLERANCES
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter

WORDS = {"fp16": "float16", "bf16": "bfloat16"}


@pytest.fixture(scope="module", params=WORDS)
def foreign(request, tmp_path_factory):
    """A graph of that type, and an adapter for it."""
    folder = tmp_path_factory.mktemp(request.param)
    graph = save_foreign_graph(folder / "foreign", request.param)
    save_routed_adapter(graph, folder / "adapter")
    return request.param, folder


def _export(foreign, tmp_path, **options):
    _, folder = foreign
    request = ExportRequest(
        str(folder / "foreign" / "model.onnx"), tmp_path / "out", adapter=folder / "adapter", **options
    )
    return export_model(request, Reporter())


def test_graph_is_described_by_its_own_dtype_when_it_has_16_bits(foreign, tmp_path):
    dtype, folder = foreign
    opened = open_foreign_graph(folder / "foreign" / "model.onnx")
    assert opened.stored_dtype == WORDS[dtype]
    result = _export(foreign, tmp_path, parity=False)
    assert result.description.dtype == dtype
    inputs = {spec.name: spec.dtype for spec in result.description.interface.inputs}
    assert inputs["past_key_values.0.key"] == WORDS[dtype]
    assert result.description.lowering == "compact"


@pytest.mark.parametrize("lowering", ["auto", "masked", "compact"])
def test_parity_is_judged_by_its_dtype_when_the_graph_has_16_bits(foreign, tmp_path, lowering):
    dtype, _ = foreign
    result = _export(foreign, tmp_path, lowering=lowering)
    parity = result.description.parity
    if dtype == "bf16":
        assert parity == ParityVerdict("NOT RUN", "ONNX Runtime's CPU provider does not implement bfloat16")
    else:
        assert parity.verdict in ("PASS", "AMBIGUOUS"), result.parity_summary  # near-ties may turn
        report = json.loads((result.folder / "parity.json").read_text())
        assert report["dtype"] == "fp16"
        assert report["tolerance"] == dataclasses.asdict(TOLERANCES["fp16"])
        # In fp32's tolerance it would fail: it really ran in 16 bits.
        assert max(case["logits"]["mean"] for case in report["cases"]) > TOLERANCES["fp32"].mean


def test_cast_is_refused_when_a_graph_has_another_dtype(foreign, tmp_path):
    dtype, _ = foreign
    assert _export(foreign, tmp_path, dtype=dtype, parity=False).description.dtype == dtype
    with pytest.raises(InputError, match=f"a graph keeps its own dtype, {dtype}"):
        _export(foreign, tmp_path / "cast", dtype="fp32")


def test_dtype_is_refused_when_there_is_no_such_type(tmp_path):
    with pytest.raises(InputError, match=r"--dtype fp64: no such type\s+hint: choose one of auto, fp32, fp16, bf16"):
        ExportRequest("model", tmp_path, dtype="fp64")
