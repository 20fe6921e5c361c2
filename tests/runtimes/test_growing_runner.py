"""A runtime of one's own: onnx's reference evaluator behind the `Runner` protocol, through parity."""

import functools

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from dlo_export.exporter.artefact_runner import exposed_model
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.growing_runner import GrowingRunner
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.compare import Candidate, compare
from dlo_export.runtimes.torch.reference import open_reference
from tests.tiny_models import save_tiny_llama


def _specs(values):
    words = onnx.TensorProto.DataType.Name
    return [
        TensorSpec(
            value.name,
            words(value.type.tensor_type.elem_type).lower(),
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


class EvaluatorRunner(GrowingRunner):
    """Of a model in memory, weights included."""

    def __init__(self, model, name):
        graph = model.graph
        super().__init__(name, DecoderInterface.of(_specs(graph.input), _specs(graph.output), name, cache="growing"))
        self._evaluator = ReferenceEvaluator(model)
        self._cache = {}

    def _empty_cache(self, batch):
        shapes = self._interface.state_shapes(batch)
        self._cache = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}

    def _run(self, feeds, request):
        values = self._evaluator.run(None, {**feeds, **self._cache})
        outputs = dict(zip(self._evaluator.output_names, values, strict=True))
        self._cache = {past: outputs[present] for past, present in self._interface.present_of.items()}
        return outputs

    def _free(self):
        self._cache = {}


def test_parity_passes_when_a_runtime_is_its_three_methods(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    export_model(ExportRequest(str(folder), tmp_path / "out", parity=False), Reporter())

    def opened(**shown):
        graph = load_graph(tmp_path / "out" / "model.onnx")
        model = onnx.load_from_string(exposed_model(graph, **shown))
        onnx.load_external_data_for_model(model, str(tmp_path / "out"))
        return EvaluatorRunner(model, "onnx")

    source = open_source(str(folder), None)
    with open_reference(source.config_json(), source.tensors()) as reference:
        report = compare(
            reference,
            [Candidate("onnx", opened, functools.partial(opened, force=True))],
            parity_cases(64, routed=True, seed=0),
            dtype="fp32",
        )
    assert report, report.summary()
    source.close()
