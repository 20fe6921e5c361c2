"""A lowering that this file alone knows: everybody else must take it from its record."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.inspection import inspect_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt
from dlo_export.exporter.tensorrt.twin import tensorrt_twin
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.lowerings import registry
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.lowerings.record import ONNXRUNTIME, LoweringRecord
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.provenance import CLOSES_KEY, TaggedNodes
from tests.tiny_models import save_tiny_llama

ROUTED = (True, False, True)


@dataclasses.dataclass(frozen=True)
class LowerSkipToProductPass(LoweringPass):
    """Multiply the branch by the mask, and subtract its negative from the stream: no Where and no Add is left.

    Before::

        y = Add(h, Where(Unsqueeze(active, -1), d, 0))

    After::

        y = Sub(h, Mul(d, Neg(Cast(Unsqueeze(active, -1)))))
    """

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Rewrite one layer."""
        block, index = masked.layer.mlp, masked.layer.index
        mlp, dtype, shape = f"model.layers.{index}.mlp", element_type(block.stream_operand), block.stream_out.shape
        new = TaggedNodes(type(self).__name__, index)
        column = masked.select.inputs[0]
        assert column is not None
        assert dtype is not None
        factor = new.add("Cast", column, name=f"{mlp}.factor", dtype=dtype, shape=column.shape, to=int(dtype))
        negative = new.add("Neg", factor, name=f"{mlp}.negative", dtype=dtype, shape=column.shape)
        product = new.add("Mul", masked.kept, negative, name=f"{mlp}.product", dtype=dtype, shape=shape)
        total = new.add(
            "Sub", block.stream_operand, product, name=f"{mlp}.difference", dtype=dtype, shape=shape, closes=1
        )
        graph.insert_before(block.add, new.nodes)
        replace_value(block.stream_out, total)
        remove_with_sources(graph, block.add)


RECORD = LoweringRecord(
    name="product",
    targets=(*ONNXRUNTIME, "tensorrt"),
    make_pass=lambda workload: LowerSkipToProductPass(),
    stage=lowered_stage(LowerSkipToProductPass.__name__),
    skips="nothing",
    not_capturable=None,
    reason="it is a toy",
    suits=lambda workload: True,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowering is known while a test runs."""
    monkeypatch.setattr(registry, "EXTRA_RECORDS", [RECORD])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("toy") / "model", layers=3, routed=ROUTED)


@pytest.fixture
def artefact(checkpoint: Path, tmp_path: Path) -> ExportResult:
    request = ExportRequest(str(checkpoint), tmp_path / "artefact", lowering="product")
    return export_model(request, Reporter())


def test_toy_lowering_passes_parity_and_is_described_when_exported(artefact: ExportResult) -> None:
    assert artefact.description.lowering == "product"
    assert artefact.description.lowering_reason == "asked for"
    assert artefact.description.parity.verdict == "PASS"
    assert artefact.parity_summary is not None
    assert "product" in artefact.parity_summary


def test_layers_are_found_and_inspected_when_saved_graph_has_the_toy_lowering(artefact: ExportResult) -> None:
    model = ir.load(artefact.folder / "model.onnx")
    layers = find_decoder_layers(model.graph)
    assert [layer.mlp.add.op_type for layer in layers] == ["Sub", "Add", "Sub"]
    for layer in layers:
        assert f"model.layers.{layer.index}.mlp.down_proj" in {node.name for node in layer.mlp.nodes}
    inspection = inspect_model(artefact.folder)
    assert inspection.layers_problem is None
    assert inspection.skips == "nothing"
    assert [layer["routed"] for layer in inspection.layers] == list(ROUTED)


def test_layers_are_not_found_when_the_closing_nodes_lost_their_tags(artefact: ExportResult) -> None:
    """The tag is what the finder goes by: without it, the toy's subtraction is nobody's business."""
    model = ir.load(artefact.folder / "model.onnx")
    for node in model.graph:
        node.metadata_props.pop(CLOSES_KEY, None)
    with pytest.raises(ValueError, match="find_decoder_layers: "):
        find_decoder_layers(model.graph)


@pytest.mark.parametrize("choice", ["product", "auto"])
def test_tensorrt_plans_the_toy_lowering_when_choice_is(choice: str, checkpoint: Path, artefact: ExportResult) -> None:
    source = open_source(checkpoint, None)
    plan = plan_tensorrt(source, TensorRtRequest(backend="rtx"), choice, "bf16")
    (engine,) = plan.engines
    assert engine.options.lowering == "product"
    assert engine.reason == ("asked for" if choice == "product" else "it is a toy")
    assert [layer.mlp.add.op_type for layer in find_decoder_layers(engine.model.graph)] == ["Sub", "Add", "Sub"]
    twin = tensorrt_twin(source, engine.options, ir.load(artefact.folder / "model.onnx"))
    assert sum(CLOSES_KEY in node.metadata_props for node in twin.graph) == sum(ROUTED)


def test_toy_lowering_is_refused_or_passed_over_when_tokens_skip_whole_layers(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=ROUTED, model_type="llama_dlo")
    with pytest.raises(
        InputError, match=r"is of layer routing, --lowering product takes mlp routing\s+hint: choose plugin, if, comp"
    ):
        export_model(ExportRequest(str(model), tmp_path / "out", lowering="product", parity=False), Reporter())
    assert not (tmp_path / "out").exists()
    result = export_model(ExportRequest(str(model), tmp_path / "out", parity=False), Reporter())
    assert result.description.lowering == "compact"
