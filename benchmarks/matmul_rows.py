"""What an MLP's products cost by the number of rows: the bound of whoever computes for some tokens only.

A chain of MLPs with weights of their own, more than caches hold, as a decoder has them; in one product each for gate,
up and down, with gate and up side by side in one, and as 1×1 convolutions, whose operands change places. Rows are
measured in turn, in one process.

    python -m benchmarks.matmul_rows
    python -m benchmarks.matmul_rows --hidden 2048 --intermediate 8192 --layers 4
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common.measure import Samples, print_report, versions

ROWS = (1, 2, 4, 8, 12, 13, 16, 32, 48, 63, 64, 65, 96, 127, 128)
FORMS = ("apart", "side by side", "convolutions")
FULL = ROWS[-1]


def session_of(form: str, hidden: int, intermediate: int, layers: int, threads: int) -> ort.InferenceSession:
    """A chain of MLPs on [rows, hidden], or as convolutions on [1, hidden, 1, rows].

    Args:
        form: Of FORMS.
        hidden: Width of the rows.
        intermediate: Of the MLPs.
        layers: How many.
        threads: Of the session.
    """
    random, options = np.random.default_rng(0), ort.SessionOptions()
    options.intra_op_num_threads = threads
    convolutions = form == "convolutions"
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def node(op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> list[ir.Value]:
        nodes.append(ir.node(op_type, inputs, attributes, num_outputs=outputs))
        return list(nodes[-1].outputs)

    def product(value: ir.Value, height: int, width: int) -> ir.Value:
        name, shape = f"weight_{len(weights)}", (width, height, 1, 1) if convolutions else (height, width)
        array = random.standard_normal(shape, np.float32) * np.float32(height**-0.5)
        weights.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        operands = (value, weights[-1])
        return node("Conv" if convolutions else "MatMul", *operands)[0]

    shape = (1, hidden, 1, "rows") if convolutions else ("rows", hidden)
    x = rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    for _ in range(layers):
        if form == "side by side":
            gate, up = node("Split", product(x, hidden, 2 * intermediate), outputs=2, axis=-1, num_outputs=2)
        else:
            gate, up = product(x, hidden, intermediate), product(x, hidden, intermediate)
        (gated,) = node("Mul", node("Mul", gate, node("Sigmoid", gate)[0])[0], up)
        x = product(gated, intermediate, hidden)
    x.name, x.type = "result", rows.type
    graph = ir.Graph([rows], [x], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="mlps")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    table, record = [], {}
    for form in FORMS:
        session = session_of(form, given.hidden, given.intermediate, given.layers, given.threads)
        times: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(given.rounds):
            for rows, measured in times.items():
                shape = (1, given.hidden, 1, rows) if form == "convolutions" else (rows, given.hidden)
                feeds = {"rows": np.random.default_rng(rows).standard_normal(shape, np.float32)}
                session.run(None, feeds)
                start = time.perf_counter()
                session.run(None, feeds)
                measured.append((time.perf_counter() - start) / given.layers * 1e6)
        samples = {rows: Samples(np.array(measured)) for rows, measured in times.items()}
        shares = {rows: samples[rows] / samples[FULL] for rows in ROWS}
        table += [[form, rows, samples[rows], shares[rows], f"{rows / FULL:.2f}"] for rows in ROWS]
        record[form] = {rows: {"us": samples[rows].summary(), "share": shares[rows].summary()} for rows in ROWS}
    print_report(
        f"An MLP of {given.hidden} to {given.intermediate} by rows, fp32, {given.threads} threads",
        ["products", "rows", "µs per layer", f"over {FULL} rows", "share of rows"],
        table,
        {"layers": given.layers, "forms": record, "versions": versions("onnxruntime", "numpy")},
    )


if __name__ == "__main__":
    main()
