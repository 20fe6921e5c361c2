"""A TensorRT graph run by a bare onnxruntime session, by the documented interface of the static cache alone."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dlo_export.checkpoints.interface import continuation_of, is_state_input
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS, reference_function


def runnable(model):
    """A serialised copy in which the dlo operators have their bodies in standard operators."""
    model = ir.from_proto(ir.to_proto(model))
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == "dlo"}
    for name in sorted(used):
        function = reference_function(PLUGIN_OPS[name])
        model.functions[function.identifier()] = function
    return ir.to_proto(model).SerializeToString()


class StaticSession:
    """The graph, its KV cache (zeroed at first, updated by every step), and how much of it each sequence uses."""

    def __init__(self, model, batch):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(runnable(model), options, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.state = {
            value.name: np.zeros((batch, *value.shape[1:]), np.float32)
            for value in self.session.get_inputs()
            if is_state_input(value.name)
        }
        self.lengths = np.zeros(batch, np.int64)

    def step(self, rows, **more):
        """Feeds the next tokens of every sequence, right-ragged; returns all outputs."""
        counts = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), counts.max()), np.int64)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = row
        feeds = {
            "input_ids": ids,
            "position_ids": self.lengths[:, None] + np.arange(counts.max()),
            "write_indices": self.lengths,
            "kv_lengths": self.lengths + counts,
        }
        outputs = dict(zip(self.outputs, self.session.run(None, feeds | self.state | more), strict=True))
        self.state = {name: outputs[continuation_of(name)] for name in self.state}
        self.lengths = self.lengths + counts
        return outputs
