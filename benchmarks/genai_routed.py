"""onnxruntime-genai's own graph routed in place, in onnxruntime-genai: what routing costs there, what skipping saves.

The builder's graph (4 bits, GroupQueryAttention with its cache in one buffer) is compared with itself routed so that
nothing, half of the layers' MLPs, or every MLP is skipped, and with itself without MLPs, the most that skipping saves.
Decode is measured in `if`, which `auto` would choose for steps of one token, and in `compact`, whose products of no
rows return at once; with `--ort-plugin-library` in `plugin` too, where one operator of the library finds these rows.
One more graph asks a single router for all layers: what it takes over the untouched one is what the Ifs cost, the rest
of "nothing skipped" is the routers. These are real ones, of zeros: their scores are one half, and a layer's threshold
says whether that is enough. Decode is one token of batch 1 behind 128 tokens, prefill is 128 tokens, each with the
choice of the next token. Each graph has the machine to itself: its process is started, measured and ended, in turn.

    python -m benchmarks.genai_routed
    python -m benchmarks.genai_routed --shape h2048 --phase decode
    python -m benchmarks.genai_routed --phase decode --ort-plugin-library plugins/library/build/libdlo_ort.so

`qwen2` is Qwen2.5-Coder-0.5B-Instruct, its weights dequantised from a GGUF file and quantised again by the builder,
`h2048` a random model of hidden size 2048, intermediate size 8192 and 8 layers, where MLPs are most of the work.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common.arguments import existing_file
from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.one_router import ask_first_router
from benchmarks.common.qwen2 import VOCABULARY as QWEN2_VOCABULARY
from benchmarks.common.qwen2 import qwen2_folder
from benchmarks.common.random_llama import H2048, random_llama_folder
from benchmarks.common.smollm2 import VOCABULARY, distinct_tokens, smollm2_folder
from benchmarks.common.workers import Worker, alternate_workers, launch_workers_in_turn
from benchmarks.common.workspace import temporary_folder
from benchmarks.dense_speed import build_with_genai
from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.pipeline import prepare_foreign
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.plugins.ort_registration import LIBRARY

PROMPT = 128
OVERHEAD_BAR, EFFICIENCY_BAR = 1.03, 0.85
UNTOUCHED, NOTHING, HALF, ALL, CUT = "untouched", "nothing skipped", "half skipped", "all skipped", "without MLPs"
IFS = "one router for all Ifs"
TITLES = {
    "smollm2": "SmolLM2-135M",
    "qwen2": "Qwen2.5-Coder-0.5B",
    "h2048": "H=2048, I=8192, 8 layers, random weights",
}
LAUNCHES = 8
RUNS, SETTLE = {"decode": 60, "prefill": 8}, {"decode": 20, "prefill": 3}
BLOCKS = 4
LOWERINGS = {"decode": ("if", "compact"), "prefill": ("compact",)}
PLUGIN = "plugin"


def routed_graph(graph: Path, folder: Path, active: list[bool], lowering: str, library: Path | None = None) -> Path:
    """The graph with a router on every layer.

    Args:
        graph: The builder's.
        folder: Made.
        active: By layer, whether its MLP runs.
        lowering: What skips it.
        library: libdlo_ort.so, for the plugin lowering; a copy of it lies beside the graph, where genai looks for it.
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
    if library is not None:
        shutil.copy(library, folder / LIBRARY)
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


def checkpoint_of(shape: str, folder: Path) -> Path:
    """The checkpoint folder of a shape; the builder asks for a tokenizer, which random weights borrow.

    Args:
        shape: Of TITLES.
        folder: Where one is put together.
    """
    if shape != "h2048":
        return qwen2_folder() if shape == "qwen2" else smollm2_folder()
    made = folder / "checkpoint"
    made.mkdir()
    for file in random_llama_folder("random-h2048", H2048).iterdir():
        (made / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).symlink_to(smollm2_folder() / name)
    return made


def graph_with_one_router(routed: Path, folder: Path) -> Path:
    """The graph all of whose Ifs ask the first layer's router: what is left of routing's costs are the Ifs.

    Args:
        routed: With `--lowering if`, all layers alike in what they decide.
        folder: Made.
    """
    model = ir.load(routed)
    ask_first_router(model)
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    shutil.copy(routed.parent / "genai_config.json", folder)
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


def more_per_layer(times: dict[str, Samples], name: str, layers: int) -> Samples:
    """Microseconds that a graph takes over the untouched one, by layer."""
    return Samples((times[name].values - times[UNTOUCHED].values) * 1000 / layers)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shape", choices=tuple(TITLES), default="smollm2")
    parser.add_argument("--precision", choices=("int4", "fp32"), default="int4")
    parser.add_argument("--phase", choices=tuple(LOWERINGS), action="append", help="may be given twice; default: both")
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument(
        "--ort-plugin-library", type=existing_file, help="libdlo_ort.so: measure the plugin lowering too"
    )
    parser.add_argument("--lowering", action="append", help="measure this one alone; may be given again; default: all")
    parser.add_argument("--artefacts", type=Path, help="keep the graphs here, and take them from here")
    parser.add_argument("--busy", action="store_true", help="take the machine as it is")
    parser.add_argument("--huge-pages", action="store_true", help="weights in pages of 2 MiB: launches differ by less")
    parser.add_argument("--alternate", action="store_true", help="all graphs at once, in alternating blocks")
    return parser.parse_args()


def measured(given: argparse.Namespace, start: dict[str, Callable[[], Worker]], phase: str) -> dict[str, Samples]:
    """Milliseconds by graph."""
    how: dict[str, Any] = {"launches": given.launches, "settle": SETTLE[phase], "busy": given.busy}
    if given.alternate:
        return alternate_workers(start, blocks=BLOCKS, runs=RUNS[phase] // BLOCKS, **how)
    return launch_workers_in_turn(start, runs=RUNS[phase], **how)


def main() -> None:
    given = arguments()
    if given.huge_pages:
        use_huge_pages()
    rows, record = [], {}
    vocabularies: dict[str, Any] = {
        "smollm2": VOCABULARY,
        "qwen2": QWEN2_VOCABULARY,
        "h2048": H2048["vocab_size"],
    }
    tokens = distinct_tokens(PROMPT + 1, vocabularies[given.shape])
    with temporary_folder() as temporary:
        folder = given.artefacts or temporary
        folder.mkdir(exist_ok=True)

        def made(name: str, make: Callable[[Path], object]) -> Path:
            target = folder / name.replace(" ", "-")
            if not target.exists():
                make(target)
            return target / "model.onnx"

        def lowerings(phase: str) -> tuple[str, ...]:
            known = (*LOWERINGS[phase], *((PLUGIN,) if given.ort_plugin_library else ()))
            return tuple(name for name in known if given.lowering is None or name in given.lowering)

        def build(target: Path) -> None:
            build_with_genai(checkpoint_of(given.shape, temporary), target, given.precision)

        graph = made("genai", build)
        layers = open_foreign_graph(graph).num_layers
        patterns = {NOTHING: [True] * layers, HALF: [i % 2 == 0 for i in range(layers)], ALL: [False] * layers}
        for phase, step, sequence in (("decode", tokens, 1), ("prefill", tokens[:, :PROMPT], PROMPT)):
            if given.phase and phase not in given.phase:
                continue
            np.save(folder / "tokens.npy", step)
            graphs = {UNTOUCHED: graph, CUT: made("cut", functools.partial(graph_without_mlps, graph))}
            skipped: dict[str, float] = {}  # share of the MLPs, by graph
            for lowering in lowerings(phase):
                for pattern, active in patterns.items():
                    name = f"{pattern}, {lowering}"
                    library = given.ort_plugin_library if lowering == PLUGIN else None
                    route = functools.partial(routed_graph, graph, active=active, lowering=lowering, library=library)
                    graphs[name], skipped[name] = made(name, route), 1 - sum(active) / layers
                if lowering == "if":
                    one_router = functools.partial(graph_with_one_router, graphs[f"{NOTHING}, {lowering}"])
                    graphs[IFS], skipped[IFS] = made(IFS, one_router), 0.0
            options: list[str | Path] = [folder / "tokens.npy", "--sequence", str(sequence)]
            options += ["--threads", str(given.threads)]
            start: dict[str, Callable[[], Worker]] = {
                name: functools.partial(Worker, "benchmarks.common.genai_worker", path, *options)
                for name, path in graphs.items()
            }
            times = measured(given, start, phase)
            for name, time in times.items():
                ratio, share = time / times[UNTOUCHED], skipped.get(name)
                saved = saved_share(times, name, share) if share else ""
                more = more_per_layer(times, name, layers) if share == 0 else ""
                bars = {NOTHING: f"≤ {OVERHEAD_BAR}", ALL: f"saved ≥ {EFFICIENCY_BAR}"}
                bar = bars.get(name.partition(",")[0], "")
                rows.append([phase, name, time, "" if name == UNTOUCHED else ratio, more, saved, bar])
                record[f"{phase}, {name}"] = {
                    "milliseconds": time.summary(),
                    "ratio": ratio.summary(),
                    **({} if isinstance(more, str) else {"more_microseconds_per_layer": more.summary()}),
                    **({} if isinstance(saved, str) else {"saved": saved.summary()}),
                }
    print_report(
        f"{TITLES[given.shape]}, in onnxruntime-genai, its builder's graph, {given.precision}, {given.threads} threads",
        [
            "phase",
            "graph",
            "ms",
            "this / untouched",
            "µs per layer more",
            "of the skipped MLPs' time saved",
            "bar",
        ],
        rows,
        {
            "shape": given.shape,
            "precision": given.precision,
            "lowerings": {phase: lowerings(phase) for phase in LOWERINGS},
            "batch": 1,
            "prompt": PROMPT,
            "launches": given.launches,
            "huge_pages": given.huge_pages,
            "alternate": given.alternate,
            "runs": RUNS,
            "warm_up": SETTLE,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
