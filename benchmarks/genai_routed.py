"""onnxruntime-genai's own graph of SmolLM2-135M, routed in place: what routing costs there, and what skipping saves.

The builder's graph (4 bits, GroupQueryAttention with its cache in one buffer) is compared with itself routed so that
nothing, half of the layers' MLPs, or every MLP is skipped, and with itself without MLPs, the most that skipping saves.
Routers are real ones, of zeros: their scores are one half, and a layer's threshold says whether that is enough.
Decode is one token of batch 1 behind 128 tokens, prefill is 128 tokens. Processes of their own, alternating.

    python -m benchmarks.genai_routed
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.dense_speed import build_with_genai
from benchmarks.measure import Samples, print_report, versions
from benchmarks.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.workers import Worker, alternate_workers
from benchmarks.workspace import WORKSPACE
from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.pipeline import prepare_foreign
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import load_graph, open_foreign_graph
from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.rewriting import remove_unused

PROMPT = 128
OVERHEAD_BAR, EFFICIENCY_BAR = 1.03, 0.85
UNTOUCHED, NOTHING, HALF, ALL, CUT = "untouched", "nothing skipped", "half skipped", "all skipped", "without MLPs"
LAUNCHES, BLOCKS = 6, 4
RUNS, SETTLE = {"decode": 20, "prefill": 5}, {"decode": 15, "prefill": 3}
# As `auto` would choose for a step of one token, and for longer ones.
LOWERINGS = {"decode": "if", "prefill": "compact"}


def routed_graph(graph: Path, folder: Path, active: list[bool], lowering: str) -> Path:
    """The graph with a router on every layer.

    Args:
        graph: The builder's.
        folder: Made.
        active: By layer, whether its MLP runs.
        lowering: What skips it.
    """
    opened = open_foreign_graph(graph)
    hidden = opened.tensors["model.norm.weight"].shape[0]
    routers = {router_name(layer): ArrayTensor(np.zeros((1, hidden), np.float32)) for layer in range(len(active))}
    thresholds = {layer: 0.25 for layer, runs in enumerate(active) if runs}
    adapter = DloAdapter("mlp", (True,) * len(active), router_thresholds=thresholds, tensors=routers)
    save_adapter(adapter, folder.with_name(f"{folder.name}-adapter"))
    request = ExportRequest(
        str(graph), folder, adapter=folder.with_name(f"{folder.name}-adapter"), lowering=lowering, parity=False
    )
    export_model(request, Reporter())
    return folder / "model.onnx"


def graph_without_mlps(graph: Path, folder: Path) -> Path:
    """The graph whose layers are attention alone."""
    model = prepare_foreign(load_graph(graph))
    for layer in reversed(find_decoder_layers(model.graph)):
        for use in tuple(layer.mlp.stream_out.uses()):
            use.node.replace_input_with(use.idx, layer.mlp.stream_in)
    remove_unused(model.graph)
    JoinSkipNormsPass(around_routed=True)(model)
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    shutil.copy(graph.parent / "genai_config.json", folder)
    return folder / "model.onnx"


def saved_share(times: dict[str, Samples], name: str, share: float) -> Samples:
    """Of the time that the skipped MLPs take, how much is saved.

    Args:
        times: By graph.
        name: Of the routed graph.
        share: Of the MLPs, skipped there.
    """
    whole = times[UNTOUCHED].values
    return Samples((whole - times[name].values) / (share * (whole - times[CUT].values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=("int4", "fp32"), default="int4")
    parser.add_argument("--phase", choices=tuple(LOWERINGS), action="append", help="may be given twice; default: both")
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--busy", action="store_true", help="take the machine as it is")
    given = parser.parse_args()
    rows, record = [], {}
    tokens = distinct_tokens(PROMPT + 1)
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        folder = Path(temporary)
        graph = build_with_genai(smollm2_folder(), folder / "genai", given.precision)
        layers = open_foreign_graph(graph).num_layers
        patterns = {NOTHING: [True] * layers, HALF: [i % 2 == 0 for i in range(layers)], ALL: [False] * layers}
        cut = graph_without_mlps(graph, folder / "cut")
        for phase, step, sequence in (("decode", tokens, 1), ("prefill", tokens[:, :PROMPT], PROMPT)):
            if given.phase and phase not in given.phase:
                continue
            np.save(folder / "tokens.npy", step)
            graphs = {UNTOUCHED: graph, CUT: cut}
            for name, active in patterns.items():
                made = folder / f"{phase}-{name.replace(' ', '-')}"
                graphs[name] = routed_graph(graph, made, active, LOWERINGS[phase])
            options = ["--sequence", str(sequence), "--threads", str(given.threads), "--shared-cache"]
            worker = functools.partial(Worker, "benchmarks.onnxruntime_worker")
            start: dict[str, Callable[[], Worker]] = {
                name: functools.partial(worker, path, folder / "tokens.npy", *options) for name, path in graphs.items()
            }
            times = alternate_workers(
                start,
                launches=given.launches,
                blocks=BLOCKS,
                runs=RUNS[phase],
                settle=SETTLE[phase],
                busy=given.busy,
            )
            for name, time in times.items():
                ratio, share = time / times[UNTOUCHED], {HALF: sum(patterns[HALF]) / layers, ALL: 1.0}.get(name)
                saved = "" if share is None else saved_share(times, name, share)
                bar = {NOTHING: f"≤ {OVERHEAD_BAR}", ALL: f"saved ≥ {EFFICIENCY_BAR}"}.get(name, "")
                rows.append([phase, name, time, "" if name == UNTOUCHED else ratio, saved, bar])
                record[f"{phase}, {name}"] = {
                    "milliseconds": time.summary(),
                    "ratio": ratio.summary(),
                    **({} if isinstance(saved, str) else {"saved": saved.summary()}),
                }
    print_report(
        f"SmolLM2-135M, onnxruntime-genai's graph, {given.precision}, {given.threads} threads",
        ["phase", "graph", "ms", "this / untouched", "of the skipped MLPs' time saved", "bar"],
        rows,
        {
            "precision": given.precision,
            "lowerings": LOWERINGS,
            "batch": 1,
            "prompt": PROMPT,
            "launches": given.launches,
            "blocks": BLOCKS,
            "runs": RUNS,
            "warm_up": SETTLE,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
