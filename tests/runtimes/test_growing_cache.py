from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from dlo_export.checkpoints.dtypes import FLOAT32
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory
from dlo_export.runtimes.onnxruntime.growing_cache import GrowingCache
from dlo_export.runtimes.onnxruntime.providers import CPU


def _concatenating() -> ort.InferenceSession:
    """Present = past with one more row per token."""
    graph = helper.make_graph(
        [helper.make_node("Concat", ["past", "rows"], ["present"], axis=2)],
        "cache",
        [
            helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", 1, "past", 2]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 1, "sequence", 2]),
        ],
        [helper.make_tensor_value_info("present", TensorProto.FLOAT, ["batch", 1, "total", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_present_of_every_step_holds_all_rows_when_buffers_take_turns() -> None:
    session, rng = _concatenating(), np.random.default_rng(0)
    cache = GrowingCache({"past": ((2, 1, 0, 2), FLOAT32)}, {"past": "present"}, lambda: DeviceMemory(session, CPU))
    fed = np.zeros((2, 1, 0, 2), np.float32)
    # Rooms are made for 256 tokens more than needed: 300 and 700 outgrow them.
    for sequence in (1, 3, 300, 1, 700, 2):
        rows = rng.standard_normal((2, 1, sequence, 2)).astype(np.float32)
        fed = np.concatenate([fed, rows], 2)
        binding = session.io_binding()
        binding.bind_cpu_input("rows", rows)
        cache.bind(binding, sequence)
        session.run_with_iobinding(binding)
        cache.advance(binding.get_outputs())
        np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), fed)
