"""Editing an 8B-shaped graph of somebody else's: peak memory, wall time and bytes written, against a plain copy of it.

The graph is synthetic: bf16, the shapes of Llama 3 8B with a head of its own (128,256 × 4,096), tiles of random numbers
in one external data file. Embedding and head take 2.1 GB of disk, a layer 0.44 GB. An adapter injects a layer behind
every fourth one, or as many as --every says, and puts a router on each. Copies need as much disk again; memory does not
depend on the number of layers. Runs take turns, and a run's files are removed before the next one. With --sparse the
data file is one hole, which takes no disk: nothing but zeros, that come from no disk into the page cache.

    python -m benchmarks.graph_edit_size [--layers 32] [--every 4] [--runs 3] [--sparse] [--no-copies]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.measured_command import run_measured
from benchmarks.common.plain_copy import copy_command
from benchmarks.common.workspace import WORKSPACE, temporary_folder
from benchmarks.expand_memory import CONFIG, TiledTensor
from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.weight_file import save_weights
from dlo_export.runtimes.artefact.description import MODEL_NAME, WEIGHTS_NAME, load_description

BAR_MEGABYTES = 700
COPY, LINKED = "copy", "dlo-export --link-weights"


class Cost(NamedTuple):
    """Of one finished command.

    Attributes:
        seconds: Wall time.
        peak_megabytes: ru_maxrss: pages of mapped files count.
        written_gigabytes: ru_oublock: what it dirtied of the file system.
    """

    seconds: float
    peak_megabytes: float
    written_gigabytes: float


def save_graph(folder: Path, layers: int, every: int, *, sparse: bool) -> None:
    """Writes graph, config.json and adapter, a chunk in memory at a time.

    Args:
        folder: To make.
        layers: How many.
        every: Layers for one that the adapter injects.
        sparse: Leave the weights out of their file, which is as long.
    """
    config = CONFIG | {"num_hidden_layers": layers}
    parsed = LlamaConfig.from_dict(config, "synthetic")
    tile = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    weights = {name: TiledTensor(shape, tile) for name, shape in parsed.tensor_shapes().items()}
    model = plain_graph(parsed, weights, ir.DataType.BFLOAT16)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.producer_name = "somebody"
    (folder / "graph").mkdir(parents=True)
    size = save_weights(model, folder / "graph" / WEIGHTS_NAME, write=not sparse)
    if sparse:
        (folder / "graph" / WEIGHTS_NAME).touch()
        os.truncate(folder / "graph" / WEIGHTS_NAME, size)
    ir.save(model, folder / "graph" / MODEL_NAME)
    (folder / "graph" / "config.json").write_text(json.dumps(config))
    graph = open_foreign_graph(folder / "graph" / MODEL_NAME)
    plan = placements("tli", graph.num_layers, every=every)
    save_adapter(expansion_adapter(graph.tensors, plan, zero_routers=True), folder / "adapter")


def run(command: list[str], log: Path) -> Cost:
    """Runs a command to its end.

    Raises:
        RuntimeError: It failed, with what it wrote.
    """
    seconds, usage = run_measured(command, log)
    return Cost(seconds, usage.ru_maxrss / 1024, usage.ru_oublock * 512 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the graph, at least 5")
    parser.add_argument("--every", type=int, default=4, help="layers for one that is injected")
    parser.add_argument("--sparse", action="store_true", help="a graph of zeros, which takes no disk")
    parser.add_argument("--no-copies", action="store_true", help="only what links the old data file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", type=Path, help="only write graph and adapter there")
    arguments = parser.parse_args()
    layers, every = arguments.layers, arguments.every
    if arguments.write is not None:
        save_graph(arguments.write, layers, every, sparse=arguments.sparse)
        return
    shapes = LlamaConfig.from_dict(CONFIG | {"num_hidden_layers": layers}, "synthetic").tensor_shapes()
    nbytes = 2 * sum(math.prod(shape) for shape in shapes.values())
    needed = nbytes * ((not arguments.sparse) + (not arguments.no_copies)) + 2 * nbytes // every
    with temporary_folder() as folder:
        check_disk_space(folder, needed, WORKSPACE, "graph, adapter and an edited copy need")
        # By another process: what this one ever held would count as the command's, which starts as a copy of it.
        sizes = ["--layers", str(layers), "--every", str(every), *(["--sparse"] if arguments.sparse else [])]
        writer = ["-m", "benchmarks.graph_edit_size", *sizes, "--write", f"{folder}/source"]
        subprocess.run([sys.executable, *writer], check=True)
        graph, output = f"{folder}/source/graph", f"{folder}/output"
        edit = [str(Path(sys.executable).parent / "dlo-export"), f"{graph}/{MODEL_NAME}", "-o", output]
        edit += ["--adapter", f"{folder}/source/adapter", "--no-parity"]
        commands = {
            COPY: copy_command(graph, output),
            "dlo-export": edit,
            LINKED: [*edit, "--link-weights"],
        }
        if arguments.no_copies:
            commands = {LINKED: commands[LINKED]}
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        ways: dict[str, str] = {}
        for number in range(arguments.runs):
            for name in commands if number % 2 == 0 else reversed(commands):
                costs[name].append(run(commands[name], folder / "log"))
                if name != COPY:
                    (kept,) = load_description(Path(output)).kept_data
                    ways[name] = kept.how
                shutil.rmtree(output)
    figures = {
        name: {field: Samples(np.array([getattr(cost, field) for cost in each])) for field in Cost._fields}
        for name, each in costs.items()
    }
    peak = max(figures[name]["peak_megabytes"].median for name in ways)
    ratios = {name: figures[name]["seconds"] / figures[COPY]["seconds"] for name in ways if COPY in figures}
    print_report(
        f"An 8B-shaped bf16 graph of {layers} layers, {nbytes / 1e9:.1f} GB, edited with an adapter",
        ["", "kept data", "peak memory, MB", "bar", "wall, s", "wall / copy", "written, GB"],
        [
            [
                name,
                ways.get(name, ""),
                each["peak_megabytes"] if name in ways else "",
                f"< {BAR_MEGABYTES}" if name in ways else "",
                each["seconds"],
                ratios.get(name, ""),
                f"{each['written_gigabytes'].median:.2f}",
            ]
            for name, each in figures.items()
        ],
        {
            "layers": layers,
            "every": every,
            "sparse": arguments.sparse,
            "dtype": "bfloat16",
            "graph_bytes": nbytes,
            "runs": arguments.runs,
            "bar_megabytes": BAR_MEGABYTES,
            "passed": peak < BAR_MEGABYTES,
            "kept_data": ways,
            "wall_to_copy": {name: ratio.summary() for name, ratio in ratios.items()},
            **{f: {name: each[f].summary() for name, each in figures.items()} for f in Cost._fields},
            "versions": versions("dlo-export", "onnx-ir", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
