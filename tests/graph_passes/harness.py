"""One harness for every pass test: census, interface, honesty, checker, equal outputs, idempotence."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.graph_passes.errors import GraphPassError

Arrays = Mapping[str, np.ndarray]


def check_pass(
    text: str,
    pass_: ir.passes.PassBase,
    ops_before: Mapping[str, int],
    ops_after: Mapping[str, int],
    feeds: Arrays,
    *,
    new_feeds: Arrays | None = None,
    new_outputs: Sequence[str] = (),
    expected: Callable[[Arrays], Arrays] | None = None,
    tolerance: float = 1e-6,
) -> ir.Model:
    """Run a pass on a graph and check everything that must hold for any pass.

    Args:
        text: ONNX text of the model.
        pass_: The pass.
        ops_before: How many nodes of each op there must be before, subgraphs included; only the ops named are counted.
        ops_after: And after.
        feeds: Inputs of the graph.
        new_feeds: Graph inputs the pass adds, with contents.
        new_outputs: Graph outputs the pass adds.
        expected: Outputs that must hold after the pass, from those before it; None: all outputs stay the same.
        tolerance: Absolute, on every output.

    Returns:
        The model after the pass.
    """
    model = ir.from_onnx_text(text)
    assert census(model, ops_before) == dict(ops_before)
    before, interface = run_model(model, feeds), _interface(model)
    original = as_text(model)

    result = pass_(model)

    assert result.model is model
    assert result.modified == (as_text(model) != original), "PassResult.modified is not honest"
    assert census(model, ops_after) == dict(ops_after)
    assert _interface(model, set(new_feeds or {}) | set(new_outputs)) == interface, "the interface changed"
    after = run_model(model, {**feeds, **(new_feeds or {})})
    assert after.keys() == before.keys() | set(new_outputs)
    wanted = before if expected is None else expected(before)
    for name, array in wanted.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=tolerance, err_msg=name)
    check_idempotence(model, pass_)
    return model


def check_idempotence(model: ir.Model, pass_: ir.passes.PassBase) -> None:
    """A second run changes nothing and says so."""
    text = as_text(model)
    assert not pass_(model).modified
    assert as_text(model) == text


def census(model: ir.Model, ops: Mapping[str, int]) -> dict[str, int]:
    """Number of nodes of the given ops in the main graph and all subgraphs."""
    counts = collections.Counter(node.op_type for node in model.graph.all_nodes())
    return {op_type: counts[op_type] for op_type in ops}


def run_model(
    model: ir.Model, feeds: Arrays, level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
) -> dict[str, np.ndarray]:
    """Check a model and run it in ONNX Runtime, by default without any graph optimisation."""
    session = make_session(model, level)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def make_session(
    model: ir.Model,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """A CPU session of one thread for a model that passes onnx's full check."""
    proto = ir.to_proto(model)
    # onnx knows no schema of ONNX Runtime's own domain; every other domain must have one.
    vendor = any(node.domain == "com.microsoft" for node in model.graph.all_nodes())
    onnx.checker.check_model(proto, full_check=True, check_custom_domain=not vendor)
    options = options or ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check_refused(text: str, pass_: ir.passes.PassBase, reason: str) -> None:
    """Check that a pass refuses a graph, says why, and leaves it alone."""
    model = ir.from_onnx_text(text)
    before = str(model)
    with pytest.raises(GraphPassError, match=f"{type(pass_).__name__}: ") as error:
        pass_(model)
    assert reason in str(error.value)
    assert str(model) == before


def as_text(model: ir.Model) -> str:
    """The whole model, weights and metadata included."""
    return str(ir.to_proto(model))


def _interface(model: ir.Model, added: set[str] = frozenset()) -> list[tuple[str, str, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.type), str(value.shape)) for value in values if value.name not in added]
