"""Parity of graphs whose products round activations to 8 bits: rounding is told from a wrong lowering."""

import contextlib
import dataclasses

import onnx_ir as ir
import pytest

from dlo_export.exporter.exact_products import rounds_activations, with_exact_products
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.parity_check import _up_to_rounding, check_parity
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.parity.case_result import CaseResult
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.statistics import Flip, LogitStatistics
from dlo_export.runtimes.parity.tolerances import TOLERANCES, OwnError
from tests.foreign_graphs import save_routed_adapter
from tests.genai_graphs import save_genai_graph

NORM = "SkipSimplifiedLayerNormalization"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounded")
    graph = save_genai_graph(folder, "int4")
    adapter = save_routed_adapter(graph, folder / "adapter")
    export_model(
        ExportRequest(str(graph), folder / "out", adapter=adapter, lowering="compact", parity=False), Reporter()
    )
    return graph, adapter, folder / "out"


def parity_with_epsilons(artefact, factor):
    """Of the artefact, the epsilon of all its norms but the last one multiplied: what they give changes by a little."""
    graph, adapter, folder = artefact
    original = (folder / "model.onnx").read_bytes()
    model = ir.load(folder / "model.onnx")
    for node in [node for node in model.graph.all_nodes() if "epsilon" in node.attributes][:-1]:
        epsilon = node.attributes["epsilon"].as_float()
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * factor)
    ir.save(model, folder / "model.onnx")
    try:
        with contextlib.closing(open_source(str(graph), adapter)) as source:
            return check_parity(source, folder, load_description(folder))
    finally:
        (folder / "model.onnx").write_bytes(original)


def test_parity_passes_when_only_rounding_to_8_bits_differs(artefact):
    report = parity_with_epsilons(artefact, 1.05)
    assert report.verdict == "PASS", report.summary()
    assert "multiplying by activations as they are (rounded to 8 bits, " in report.reference
    assert report.tolerance == TOLERANCES["fp32"]


def test_parity_fails_when_a_difference_is_as_small_as_rounding_but_stays_without_it(artefact):
    report = parity_with_epsilons(artefact, 100)
    assert report.verdict == "FAIL", report.summary()
    worst = max(case.logits.largest for case in report.cases)
    assert worst < 0.15, "what rounding to 8 bits would be allowed"


# Of SmolLM2-135M: half of its MLPs skipped by calibrated routers, and by random ones, the worst-conditioned.
CALIBRATED, RANDOM = OwnError(0.013, 0.21, 0.18, 0.009), OwnError(0.026, 0.45, 0.99, 0.026)
FLIPPED = Flip(29, 0, 35, 0.97, 0.49)


@pytest.mark.parametrize(
    ("off", "flips", "own", "verdict"),
    [
        (0.01, (), None, "PASS"),
        (0.15, (), None, "PASS"),
        (0.16, (), None, "FAIL"),
        (float("nan"), (), None, "FAIL"),
        (0.16, (), CALIBRATED, "PASS"),
        (0.43, (), CALIBRATED, "FAIL"),
        (0.13, (FLIPPED,), CALIBRATED, "FAIL"),
        (0.13, (FLIPPED,), RANDOM, "AMBIGUOUS"),
    ],
)
def test_report_is_that_of_exact_products_up_to_what_rounding_may_do(off, flips, own, verdict):
    logits = LogitStatistics(9, 1e-3, off, off, 0, 0)
    case = CaseResult("prefill", "compact", logits, None, 0, flips, own_error=own)
    released = ParityReport("its own masked form", "fp32", TOLERANCES["fp32"], (case,))
    exactly = dataclasses.replace(case, logits=LogitStatistics(9, 1e-7, 1e-7, 1e-7, 0, 0), flips=(), own_error=None)
    exact = dataclasses.replace(released, reference="its weights dequantised", cases=(exactly,))
    found = _up_to_rounding(released, exact)
    assert found.verdict == verdict, found.summary()
    assert found.cases == (exact if verdict == "PASS" else released).cases
    assert found.reference.startswith("its own masked form")
    # What is wrong without rounding is wrong, whatever rounding explains.
    wrong = dataclasses.replace(exact, cases=(dataclasses.replace(exactly, logits=logits),))
    assert _up_to_rounding(released, wrong).verdict == "FAIL"


def test_no_product_rounds_when_none_is_asked_to(artefact):
    graph = ir.load(artefact[2] / "model.onnx")
    assert rounds_activations(graph.graph)
    assert not rounds_activations(with_exact_products(graph).graph)
    assert rounds_activations(graph.graph), "of the graph itself nothing is changed"
