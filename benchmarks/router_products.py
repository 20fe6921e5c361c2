"""What a router's product costs, its weights multiplied as a column or as a row (`MultiplyRouterRowsPass`).

A chain of matrices, more than caches hold, as a decoder has them, and in front of each a router of the same stream:
what a step takes beyond the same chain without routers, per router. The forms are measured in turn, one thread, CPU
time of that thread.

    python -m benchmarks.router_products
    python -m benchmarks.router_products --hidden 2048 --routers 30
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.measure import Samples, alternate, print_report, versions

STEPS = {"decode 1": (1, 1), "decode 4": (4, 1), "decode 16": (16, 1), "prefill 32": (1, 32), "prefill 128": (1, 128)}
WITHOUT, COLUMN, ROW = "without routers", "column", "row"
FORMS = (WITHOUT, COLUMN, ROW)
BESIDE = 256  # columns of the matrix that stands for a layer


def session_of(form: str, hidden: int, routers: int) -> ort.InferenceSession:
    """A chain that gives out every router's logits and every matrix's product.

    Args:
        form: Of FORMS.
        hidden: Width of the stream, float32 [batch, sequence, hidden].
        routers: How many.
    """
    random, options = np.random.default_rng(0), ort.SessionOptions()
    options.intra_op_num_threads = 1
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def weight(*shape: int) -> ir.Value:
        name, array = f"weight_{len(weights)}", random.standard_normal(shape, np.float32)
        weights.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return weights[-1]

    def node(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes))
        return nodes[-1].outputs[0]

    float32 = ir.TensorType(ir.DataType.FLOAT)
    stream = ir.Value(name="stream", type=float32, shape=ir.Shape(("batch", "sequence", hidden)))
    outputs = []
    for _ in range(routers):
        if form == COLUMN:
            outputs.append(node("MatMul", stream, weight(hidden, 1)))
        elif form == ROW:
            outputs.append(node("MatMul", weight(1, hidden), node("Transpose", stream, perm=(0, 2, 1))))
        outputs.append(node("MatMul", stream, weight(hidden, BESIDE)))
    for number, value in enumerate(outputs):
        value.name, value.type = f"product_{number}", float32
    graph = ir.Graph([stream], outputs, nodes=nodes, initializers=weights, opset_imports={"": 20}, name="routers")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def cpu_times(session: ort.InferenceSession, stream: np.ndarray, runs: int) -> list[float]:
    """Microseconds of this thread in each of so many steps."""
    times = []
    for _ in range(runs):
        start = time.thread_time_ns()
        session.run(None, {"stream": stream})
        times.append((time.thread_time_ns() - start) / 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--routers", type=int, default=60)
    parser.add_argument("--blocks", type=int, default=20)
    given = parser.parse_args()
    use_huge_pages()
    sessions = {form: session_of(form, given.hidden, given.routers) for form in FORMS}
    table, record = [], {}
    for step, sizes in STEPS.items():
        stream = np.random.default_rng(1).standard_normal((*sizes, given.hidden), np.float32)
        candidates = {
            form: lambda runs, session=session, stream=stream: cpu_times(session, stream, runs)
            for form, session in sessions.items()
        }
        times = alternate(candidates, blocks=given.blocks, runs=5, settle=1)
        own = {form: Samples((times[form].values - times[WITHOUT].values) / given.routers) for form in (COLUMN, ROW)}
        share = times[ROW] / times[COLUMN]
        table.append([step, own[COLUMN], own[ROW], share])
        record[step] = {**{form: samples.summary() for form, samples in own.items()}, "step": share.summary()}
    print_report(
        f"A router's product, hidden size {given.hidden}, fp32, one thread, µs of its time",
        ["step", COLUMN, ROW, "step with rows / with columns"],
        table,
        {
            "hidden": given.hidden,
            "routers": given.routers,
            "steps": record,
            "versions": versions("onnxruntime", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
